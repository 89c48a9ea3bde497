# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend on the simulator, through its C interface: packing on the host, arrays in
simulated device memory, launches. A fault of a kernel is a SimulatorError."""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from cuda_build import build
from torch import Tensor

DTYPES = {torch.float16: 0, torch.bfloat16: 1}
ASCENDING, DESCENDING, SHUFFLED = range(3)
_ERROR_BYTES = 4096


class SimulatorError(RuntimeError):
    """What a kernel did wrong, or why it was not started."""


class Layout(ctypes.Structure):
    """turbo::cuda::Layout."""

    _fields_ = (("n", ctypes.c_int64), ("k", ctypes.c_int64), ("groups", ctypes.c_int64))


class Pack(ctypes.Structure):
    """tm_cuda_pack."""

    _fields_ = (
        ("layout", Layout),
        ("bits", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero_point")),
        *((name, ctypes.c_void_p) for name in ("weight_out", "scale_out", "zero_out")),
    )


class Plan(ctypes.Structure):
    """turbo::cuda::LinearPlan."""

    _fields_ = (
        ("tile", ctypes.c_int),
        ("slices", ctypes.c_int),
        ("slice_slabs", ctypes.c_int),
        ("apart", ctypes.c_bool),
    )


class Linear(ctypes.Structure):
    """turbo::cuda::Linear."""

    _fields_ = (
        ("layout", Layout),
        ("dtype", ctypes.c_int),
        ("rows", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "zero", "bias", "y")),
        ("y_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("sums", "arrived")),
    )


@dataclass(frozen=True)
class Packed:
    """4-bit weights in the device's layout, on the host. zero is None where there are none."""

    layout: Layout
    weight: Tensor
    scale: Tensor
    zero: Tensor | None


class Device:
    """The library on the simulator; `repository` is the root of the source tree."""

    def __init__(self, repository: Path) -> None:
        sources = repository / "csrc" / "cuda"
        library = build(
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
        self._library = ctypes.CDLL(str(library))
        self._library.sim_allocate.restype = ctypes.c_uint64
        self._library.sim_allocate.argtypes = (ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t)
        self._library.sim_release.argtypes = (ctypes.c_uint64,)
        self._library.sim_copy_in.argtypes = (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t)
        self._library.sim_copy_out.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t)
        for name in ("tm_cuda_sums_bytes", "tm_cuda_arrived_words"):
            function = getattr(self._library, name)
            function.restype = ctypes.c_int64
            function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        self._library.tm_cuda_plan_linear.argtypes = (
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int,
            ctypes.c_void_p,
        )

    def _call(self, name: str, *arguments: object) -> None:
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        function = getattr(self._library, name)
        if function(*arguments, error, ctypes.c_size_t(_ERROR_BYTES)):
            raise SimulatorError(error.value.decode())

    @property
    def tiles(self) -> int:
        """How many tile shapes there are."""
        return self._library.tm_cuda_tile_count()

    def tile_rows(self, tile: int) -> int:
        """Rows of x that a tile covers."""
        return self._library.tm_cuda_tile_rows(tile)

    def pack(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, k: int, bits: int
    ) -> Packed:
        """A checkpoint's tensors, as the CPU's packing op takes them, in the device's layout."""
        layout = Layout(codes.shape[0], k, scale.shape[1])
        sizes = [ctypes.c_int64() for _ in range(3)]
        self._call("tm_cuda_pack_sizes", ctypes.byref(layout), *map(ctypes.byref, sizes))
        weight = torch.full((sizes[0].value,), -1, dtype=torch.int32)
        packed_scale = torch.full((sizes[1].value,), float("nan"), dtype=scale.dtype)
        zero = None if zero_point is None else torch.full((sizes[2].value,), -1, dtype=torch.int32)
        args = Pack(
            layout,
            0 if codes.dtype == torch.int8 else bits,
            *(None if t is None else t.data_ptr() for t in (codes, scale, zero_point)),
            *(None if t is None else t.data_ptr() for t in (weight, packed_scale, zero)),
        )
        self._call("tm_cuda_pack_w4", ctypes.byref(args))
        return Packed(layout, weight, packed_scale, zero)

    def plan(self, layout: Layout, rows: int, multiprocessors: int = 132) -> Plan:
        """What the backend would launch on a device of so many multiprocessors."""
        plan = Plan()
        self._library.tm_cuda_plan_linear(
            ctypes.byref(layout), rows, multiprocessors, ctypes.byref(plan)
        )
        return plan

    @contextmanager
    def _array(self, name: str, value: Tensor | int | None, shift: int = 0) -> Iterator[int | None]:
        """An address that holds a tensor, or so many bytes that nothing has written."""
        if value is None:
            yield None
            return
        count = value if isinstance(value, int) else value.numel() * value.element_size()
        address = self._library.sim_allocate(count, name.encode(), shift)
        if isinstance(value, Tensor):
            assert value.is_contiguous()
            self._library.sim_copy_in(address, value.data_ptr(), count)
        try:
            yield address
        finally:
            self._library.sim_release(address)

    def set_order(self, order: int, seed: int = 0) -> None:
        """The order in which blocks and warps get their turns from now on."""
        self._library.sim_set_order(order, ctypes.c_uint32(seed))

    def counts(self) -> dict[str, int]:
        """Instructions since the last call."""
        numbers = (ctypes.c_uint64 * 3)()
        self._library.sim_counts(numbers)
        return dict(zip(("mma", "ldmatrix", "ldmatrix_conflicts"), numbers, strict=True))

    def w4a16_linear(
        self,
        x: Tensor,
        packed: Packed,
        bias: Tensor | None,
        plan: Plan,
        pad: int = 0,
        shift: int = 0,
        launches: int = 1,
    ) -> Tensor:
        """y of the last of `launches` equal launches; all must give the same bits.

        x [M, K] lies in rows that `pad` NaN elements follow, y in rows that `pad` elements follow
        that must stay unwritten; both begin `shift` bytes after a multiple of 256.
        """
        rows, k = x.shape
        n = packed.layout.n
        wide = torch.full((rows, k + pad), float("nan"), dtype=x.dtype)
        wide[:, :k] = x
        layout, plan_at = ctypes.byref(packed.layout), ctypes.byref(plan)
        sums = self._library.tm_cuda_sums_bytes(plan_at, layout, rows)
        arrived = self._library.tm_cuda_arrived_words(plan_at, layout, rows)
        counters = torch.zeros(arrived, dtype=torch.int32)
        bytes_y = rows * (n + pad) * 2
        result: Tensor | None = None
        with (
            self._array("x", wide, shift) as x_at,
            self._array("weight", packed.weight) as weight_at,
            self._array("scale", packed.scale) as scale_at,
            self._array("zero", packed.zero) as zero_at,
            self._array("bias", bias) as bias_at,
            self._array("sums", sums or None) as sums_at,
            self._array("arrived", counters if arrived else None) as arrived_at,
        ):
            for _ in range(launches):
                with self._array("y", bytes_y, shift) as y_at:
                    args = Linear(
                        packed.layout,
                        DTYPES[x.dtype],
                        rows,
                        x_at,
                        k + pad,
                        weight_at,
                        scale_at,
                        zero_at,
                        bias_at,
                        y_at,
                        n + pad,
                        sums_at,
                        arrived_at,
                    )
                    self._call("tm_cuda_w4a16_linear", ctypes.byref(args), plan_at, None)
                    y = torch.empty(rows, n + pad, dtype=x.dtype)
                    self._library.sim_copy_out(y.data_ptr(), y_at, bytes_y)
                words = y.view(torch.int16)
                assert (words[:, n:] == -1).all(), "y was written beside its rows"
                assert result is None or torch.equal(words, result), "two launches differ"
                result = words
            if arrived:
                self._library.sim_copy_out(counters.data_ptr(), arrived_at, arrived * 4)
                assert not counters.any(), "a counter was not set back"
        assert result is not None
        return result[:, :n].contiguous().view(x.dtype)


@functools.cache
def device(repository: Path) -> Device:
    """The one library of this process."""
    return Device(repository)
