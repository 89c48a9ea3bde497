# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend on a GPU: the library that `make cuda` builds, with memory from torch. The tests
of the simulator's kernels run on it, `pytest tests/cuda --gpu`."""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from cuda_device import Device, DeviceError
from torch import Tensor

_ALIGNED = 256
_UNWRITTEN = 0xFF


class Gpu(Device):
    """The first GPU; `library` is build/cuda/libturbo_cuda.so."""

    def __init__(self, library: Path) -> None:
        super().__init__(ctypes.CDLL(str(library)))
        self._arrays: dict[int, Tensor] = {}

    def call(self, name: str, *arguments: object) -> None:
        """As the simulator does it: a call returns when its kernels have."""
        super().call(name, *arguments)
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceError(f"{name}: {error}") from error

    @contextmanager
    def array(self, name: str, value: Tensor | int | None, shift: int = 0) -> Iterator[int | None]:
        if value is None:
            yield None
            return
        count = value if isinstance(value, int) else value.numel() * value.element_size()
        # torch's blocks begin at multiples of 512 bytes.
        memory = torch.full((_ALIGNED + shift + count,), _UNWRITTEN, dtype=torch.uint8).cuda()
        place = memory[_ALIGNED + shift :]
        if isinstance(value, Tensor) and count:
            place.copy_(value.contiguous().view(-1).view(torch.uint8))
        address = memory.data_ptr() + _ALIGNED + shift
        self._arrays[address] = place
        try:
            yield address
        finally:
            del self._arrays[address]

    def read(self, address: int, *shape: int, dtype: torch.dtype) -> Tensor:
        out = torch.empty(shape, dtype=dtype)
        count = out.numel() * out.element_size()
        if count:
            out.view(-1).view(torch.uint8).copy_(self._arrays[address][:count])
        return out

    @property
    def wgmma(self) -> bool:
        return bool(self.library.tm_cuda_has_wgmma(*torch.cuda.get_device_capability()))

    def set_order(self, order: int, seed: int = 0) -> None:
        """Nothing: a GPU runs blocks in an order of its own."""

    def counts(self) -> dict[str, int]:
        """What tests expect of the simulator's counts; a GPU has none."""
        return {"mma": 1, "wgmma": 1, "ldmatrix": 0, "ldmatrix_conflicts": 0}


@functools.cache
def gpu(repository: Path) -> Gpu:
    """The one library of this process; RuntimeError with the cure where there is none."""
    path = repository / "build" / "cuda" / "libturbo_cuda.so"
    if not path.is_file():
        raise RuntimeError(f"{path} is missing: `make cuda` builds it")
    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees no GPU")
    return Gpu(path)
