# SPDX-License-Identifier: Apache-2.0
"""Where tensors lie in a safetensors file: headers read and made, bytes read and written in place.

The safetensors library maps whole files and writes them in one go from memory; a conversion larger
than memory needs both in pieces. The library reads everything that is written here.
"""

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vllm_plugin_tm.quantization.convert.errors import ConvertError

_LENGTH = struct.Struct("<Q")
_MAX_HEADER = 100 << 20  # the library's own limit
_ALIGNMENT = 8

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
"""The format's names of types, and torch's."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Spec:
    """A tensor to be: its name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: `offset` is that of its first byte in the file."""

    file: Path
    spec: Spec
    offset: int


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file in the order of their bytes.

    Raises ConvertError naming the file for one that is truncated or is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH.size)
        length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else -1
        if not 2 <= length <= min(_MAX_HEADER, size - _LENGTH.size):
            raise ConvertError(f"{path}: no safetensors file, or a truncated one ({size} bytes)")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ConvertError(f"{path}: its header is damaged: {error}") from None
    base = _LENGTH.size + length
    header.pop("__metadata__", None)
    tensors = []
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ConvertError(
                f"{path}: tensor {name} has type {entry['dtype']}; known are {', '.join(DTYPES)}"
            )
        spec = Spec(name, DTYPES[entry["dtype"]], tuple(entry["shape"]))
        begin, end = entry["data_offsets"]
        if end - begin != spec.nbytes or begin < 0:
            raise ConvertError(f"{path}: tensor {name} has {end - begin} bytes, not {spec.nbytes}")
        if base + end > size:
            raise ConvertError(
                f"{path}: truncated: tensor {name} ends at byte {base + end}, the file at {size}"
            )
        tensors.append(Stored(path, spec, base + begin))
    tensors.sort(key=lambda stored: stored.offset)
    return {stored.spec.name: stored for stored in tensors}


def make_header(specs: Iterable[Spec]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file with these tensors in this order, and where each one begins."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, position = {}, 0
    for spec in specs:
        begins[spec.name] = position
        entries[spec.name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + _LENGTH.size) % _ALIGNMENT)
    base = _LENGTH.size + len(text)
    return _LENGTH.pack(len(text)) + text, {name: base + at for name, at in begins.items()}


class Reader:
    """Open files, read in place by any number of threads; a context that closes them."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def open(self, paths: Iterable[Path]) -> None:
        """Opens what will be read, before threads do."""
        for path in paths:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Closes every file."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, stored: Stored, first: int, shape: tuple[int, ...]) -> Tensor:
        """A tensor [shape] of the values of `stored` from number `first` on, in its dtype.

        Raises ConvertError where the file ends before.
        """
        dtype = stored.spec.dtype
        data = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        view = data.numpy().data
        position = stored.offset + first * dtype.itemsize
        while view:
            count = os.preadv(self._descriptors[stored.file], [view], position)
            if not count:
                raise ConvertError(f"{stored.file}: truncated while it was read")
            view, position = view[count:], position + count
        return data.view(dtype).view(shape)


def write_at(descriptor: int, data: Tensor, position: int) -> None:
    """Writes a contiguous tensor's bytes at `position` of an open file."""
    view = data.contiguous().view(-1).view(torch.uint8).numpy().data
    while view:
        count = os.pwrite(descriptor, view, position)
        view, position = view[count:], position + count
