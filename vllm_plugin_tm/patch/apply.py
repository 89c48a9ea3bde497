# SPDX-License-Identifier: Apache-2.0
"""Applying the patch table: everything is checked first, then all of it happens or none."""

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast

from vllm_plugin_tm import machine
from vllm_plugin_tm.patch.table import CONTRACTS, PATCHES, Patch, accepts
from vllm_plugin_tm.versions import is_too_old


class PatchError(RuntimeError):
    """Upstream is not as the table expects it, or a change did not take."""


class PatchModule(Protocol):
    """What each module in vllm_plugin_tm.patch offers. install and remove are idempotent."""

    def install(self) -> None:
        """Makes the change in the live upstream module."""

    def remove(self) -> None:
        """Puts back what install found."""

    def installed(self) -> bool:
        """Reads upstream: is the change in place?"""


@dataclass(frozen=True)
class PatchStatus:
    """One row of the table as it stands in this process: `problems` are expectations that the
    installed vLLM does not meet, empty when all hold."""

    name: str
    target: str
    kind: str
    applied: bool
    problems: tuple[str, ...]


def of_device() -> tuple[Patch, ...]:
    """The rows of the table that this process's device has."""
    return tuple(patch for patch in PATCHES if machine.device() in patch.devices)


def apply() -> None:
    """Applies every patch of this process's device; a second call changes nothing.

    Raises PatchError, with upstream as it was, when a symbol is missing or has another signature
    (naming target, expected, found and the tested versions), or when a change did not take.
    """
    patches = of_device()
    problems = [line for patch in patches for line in _problems(patch.expects)]
    problems += _problems(CONTRACTS)
    if problems:
        tested = ", ".join(PATCHES[0].tested)
        version = importlib.import_module("vllm").__version__
        if is_too_old(version):
            raise PatchError(
                f"vLLM {version} is too old for vllm-plugin-tm, nothing was changed: expected one "
                f"of {tested}. VLLM_PLUGIN_TM=0 runs vLLM without the plugin."
            )
        raise PatchError(
            "this vLLM is not as vllm-plugin-tm expects it, nothing was changed:\n  "
            + "\n  ".join(problems)
            + f"\nTested vLLM versions: {tested}. VLLM_PLUGIN_TM=0 runs vLLM without the plugin."
        )
    try:
        modules = [(patch, _module(patch)) for patch in patches]
    except (ImportError, AttributeError) as error:
        raise PatchError(
            f"this vLLM lacks something that vllm-plugin-tm imports, nothing was changed: {error}. "
            "VLLM_PLUGIN_TM=0 runs vLLM without the plugin."
        ) from error
    done: list[PatchModule] = []
    try:
        for patch, module in modules:
            done.append(module)
            module.install()
            if not module.installed():
                raise PatchError(f"{patch.target}: the change was made but cannot be read back")
    except BaseException:
        for module in reversed(done):
            module.remove()
        raise


def remove() -> None:
    """Takes every patch back, last one first. For tests and for comparing off with on."""
    for patch in reversed(of_device()):
        _module(patch).remove()


def status() -> list[PatchStatus]:
    """Every row of the table that this process's device has, in table order. Changes nothing."""
    rows = []
    for patch in of_device():
        problems = tuple(_problems(patch.expects))
        applied = not problems and _module(patch).installed()
        rows.append(PatchStatus(patch.name, patch.target, patch.kind, applied, problems))
    return rows


def found_signature(symbol: str) -> str:
    """The live symbol's signature in the table's notation. Raises LookupError when missing."""
    module_name, _, path = symbol.partition(":")
    try:
        value: object = importlib.import_module(module_name)
        for attribute in path.split("."):
            value = getattr(value, attribute)
    except (ImportError, AttributeError) as error:
        raise LookupError(str(error)) from error
    if not callable(value):
        return type(value).__name__
    signature = inspect.signature(value)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))


def _problems(expects: Mapping[str, str]) -> list[str]:
    lines = []
    for symbol, expected in expects.items():
        try:
            found = found_signature(symbol)
        except LookupError as error:
            lines.append(f"{symbol}: expected {expected}, found nothing ({error})")
            continue
        if not accepts(expected, found):
            lines.append(f"{symbol}: expected {expected}, found {found}")
    return lines


def _module(patch: Patch) -> PatchModule:
    return cast(PatchModule, importlib.import_module(f"vllm_plugin_tm.patch.{patch.name}"))
