# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend on the simulator. A fault of a kernel is a DeviceError that names kernel, block,
thread and address."""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from cuda_build import build
from cuda_device import Device
from torch import Tensor

ASCENDING, DESCENDING, SHUFFLED = range(3)


class Simulator(Device):
    """`repository` is the root of the source tree."""

    def __init__(self, repository: Path) -> None:
        sources = repository / "csrc" / "cuda"
        path = build(
            repository,
            "sim_library",
            [
                *sorted(sources.glob("*.cpp")),
                *sorted(sources.glob("*.cu")),
                *sorted((sources / "hostsim").glob("*.cpp")),
                repository / "tests" / "cuda" / "sim_library" / "sim_library.cpp",
            ],
            ["-shared"],
            ("csrc/cuda", "csrc/cpu"),
        )
        super().__init__(ctypes.CDLL(str(path)))
        self._wgmma = False
        address, count, text = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_char_p
        self.declare("sim_allocate", address, count, text, count)
        self.declare("sim_release", None, address)
        self.declare("sim_copy_in", None, address, ctypes.c_void_p, count)
        self.declare("sim_copy_out", None, ctypes.c_void_p, address, count)
        self.declare("sim_take_sites", count, text, count)
        self.declare("sim_leave_out", None, text)

    @contextmanager
    def array(self, name: str, value: Tensor | int | None, shift: int = 0) -> Iterator[int | None]:
        if value is None:
            yield None
            return
        count = value if isinstance(value, int) else value.numel() * value.element_size()
        address = self.library.sim_allocate(count, name.encode(), shift)
        if isinstance(value, Tensor):
            assert value.is_contiguous()
            self.library.sim_copy_in(address, value.data_ptr(), count)
        try:
            yield address
        finally:
            self.library.sim_release(address)

    def read(self, address: int, *shape: int, dtype: torch.dtype) -> Tensor:
        out = torch.empty(shape, dtype=dtype, device="cpu")
        self.library.sim_copy_out(out.data_ptr(), address, out.numel() * out.element_size())
        return out

    @property
    def wgmma(self) -> bool:
        return self._wgmma

    def needs_tile(self, tile: int) -> None:
        """All run here."""

    @contextmanager
    def with_wgmma(self) -> Iterator[None]:
        """Plans are those of a device that has it."""
        self._wgmma = True
        try:
            yield
        finally:
            self._wgmma = False

    def set_order(self, order: int, seed: int = 0) -> None:
        """The order in which blocks and warps get their turns from now on."""
        self.library.sim_set_order(order, ctypes.c_uint32(seed))

    def counts(self) -> dict[str, int]:
        """Instructions since the last call."""
        numbers = (ctypes.c_uint64 * 4)()
        self.library.sim_counts(numbers)
        return dict(zip(("mma", "wgmma", "ldmatrix", "ldmatrix_conflicts"), numbers, strict=True))

    def take_sites(self) -> list[str]:
        """Places in the kernels' sources that waited since the last call: barriers, waits for
        copies, fences."""
        text = ctypes.create_string_buffer(1 << 16)
        assert self.library.sim_take_sites(text, len(text)) < len(text)
        return text.value.decode().splitlines()

    @contextmanager
    def without(self, site: str) -> Iterator[None]:
        """Kernels that lack one of these places."""
        self.library.sim_leave_out(site.encode())
        try:
            yield
        finally:
            self.library.sim_leave_out(b"")


@functools.cache
def simulator(repository: Path) -> Simulator:
    """The one library of this process."""
    return Simulator(repository)
