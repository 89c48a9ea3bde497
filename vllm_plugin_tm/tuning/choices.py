# SPDX-License-Identifier: Apache-2.0
"""The file of measured tiles: for each device and kind of layer, which tile for how many rows."""

import json
import logging
import operator
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

FORMAT = "vllm-plugin-tm tuning 1"
SCHEMES = ("w4a16", "w4a8", "w8a8")
"""turbo::cuda::Scheme, whose numbers are places here."""


class TuningError(RuntimeError):
    """The file of choices cannot be used; the message names it and says why."""


class Product(NamedTuple):
    """What a choice is for: a linear layer, or with experts > 0 those, by their first product."""

    scheme: str
    n: int
    k: int
    groups: int
    experts: int


@dataclass(frozen=True)
class Choice:
    """For up to so many rows (of experts: tokens times choices of a token)."""

    rows: int
    tile: str
    apart: bool
    us: float


@dataclass
class Choices:
    """A device's products. `tiles` are the names it was measured with: where the kernels have
    others now it is to be measured again."""

    tiles: list[str]
    products: dict[Product, list[Choice]] = field(default_factory=dict)


def read(path: Path) -> dict[str, Choices]:
    """What the file has, by device; nothing if there is none. Raises TuningError."""
    try:
        found = json.loads(path.read_text())
        if found["format"] != FORMAT:
            raise TuningError(f"{path}: format {found['format']!r}, expected {FORMAT!r}")
        return {name: _parsed(part) for name, part in found["devices"].items()}
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise TuningError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TuningError(
            f"{path} is not a file of measured tiles ({error!r}): name another one, or remove it"
        ) from error


def _parsed(part: Any) -> Choices:
    names = list(part["tiles"])
    products = {}
    for entry in part["products"]:
        choices = [Choice(**choice) for choice in entry["choices"]]
        rows = [operator.index(choice.rows) for choice in choices]
        if rows != sorted(set(rows)) or not {choice.tile for choice in choices} <= set(names):
            raise ValueError(f"choices of {entry}")
        sizes = [operator.index(entry[name]) for name in Product._fields[1:]]
        product = Product(str(entry["scheme"]), *sizes)
        if product.scheme not in SCHEMES:
            raise ValueError(f"scheme {product.scheme!r}")
        products[product] = choices
    return Choices(names, products)


def write(path: Path, devices: dict[str, Choices]) -> None:
    """Writes the file at once or not at all. Raises TuningError."""
    content = {
        "format": FORMAT,
        "devices": {
            name: {
                "tiles": part.tiles,
                "products": [
                    product._asdict() | {"choices": [vars(choice) for choice in choices]}
                    for product, choices in sorted(part.products.items())
                ],
            }
            for name, part in devices.items()
        },
    }
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise TuningError(f"{path}: {error.strerror}") from error


@contextmanager
def locked(path: Path, logger: logging.Logger) -> Iterator[None]:
    """The lock of those who may write the file, which ends with its process; waits for it, and logs
    that. Raises TuningError where none can be made."""
    if not path.parent.is_dir():  # which the lock would make
        raise TuningError(f"{path}: there is no such folder")
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("waiting for another process that measures tiles: %s", lock.lock_file)
            lock.acquire()
    except OSError as error:
        raise TuningError(f"{path}: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()
