# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend through its C interface, wherever it runs: packing on the host, arrays in device
memory, launches. What a kernel does wrong is a DeviceError. Tensors name their device: vLLM's
loader sets other defaults around them."""

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass

import pytest
import torch
from c_structs import SCHEMES, Layout, Linear, LinearA8, Moe, Pack, Plan, QuantizeX
from torch import Tensor

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
_ERROR_BYTES = 4096
_RUN = 16  # codes of x that change places among each other, as csrc/cuda/layout.h has it


class DeviceError(RuntimeError):
    """What a kernel did wrong, or why it was not started."""


@dataclass(frozen=True)
class Packed:
    """Weights in the device's layout, on the host. zero and sums are None where there are none."""

    layout: Layout
    weight: Tensor
    scale: Tensor
    zero: Tensor | None = None
    sums: Tensor | None = None


@dataclass(frozen=True)
class Place:
    """Where rows lie: `pad` elements that belong to no row follow each row of x (NaN) and of y
    (which must stay unwritten); both begin `shift` bytes after a multiple of 256."""

    pad: int = 0
    shift: int = 0


@dataclass(frozen=True)
class Rounding:
    """How x becomes codes: scale float32 [1] and zero_point int32 [1] where they are given."""

    symmetric: bool = True
    scale: Tensor | None = None
    zero_point: Tensor | None = None

    @property
    def has_zeros(self) -> bool:
        """True if rows have zero points."""
        return self.zero_point is not None or not (self.symmetric or self.scale is not None)


class Device(ABC):
    """The library on a device."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self.declare("tm_cuda_sums_bytes", size, pointer, pointer, size)
        self.declare("tm_cuda_arrived_words", size, pointer, pointer, size)
        self.declare("tm_cuda_code_bytes", size, size, size)
        self.declare("tm_cuda_moe_bytes", size, pointer, ctypes.c_int)
        number = ctypes.c_int
        self.declare("tm_cuda_plan_moe_tile", number, pointer, number)
        self.declare("tm_cuda_plan_linear", None, number, pointer, size, number, number, pointer)
        self.declare("tm_cuda_choose_tiles", None, pointer, pointer, size)
        self.declare("tm_cuda_tiles_of", None, number, pointer, pointer)

    def declare(self, name: str, result: type | None, *arguments: type) -> None:
        """The types of a function of the library."""
        function = getattr(self.library, name)
        function.restype = result
        function.argtypes = arguments

    @abstractmethod
    def array(
        self, name: str, value: Tensor | int | None, shift: int = 0
    ) -> AbstractContextManager[int | None]:
        """An address that holds a tensor, or so many bytes that nothing has written, which read as
        0xFF; `shift` bytes after a multiple of 256."""

    @abstractmethod
    def read(self, address: int, *shape: int, dtype: torch.dtype) -> Tensor:
        """What lies at an address that `array` gave, written or not."""

    @abstractmethod
    def set_order(self, order: int, seed: int = 0) -> None:
        """The order in which blocks and warps get their turns from now on."""

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """mma, wgmma, ldmatrix and ldmatrix_conflicts since the last call."""

    def call(self, name: str, *arguments: object) -> None:
        """A function that may fail: DeviceError with its reason."""
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        function = getattr(self.library, name)
        if function(*arguments, error, ctypes.c_size_t(_ERROR_BYTES)):
            raise DeviceError(error.value.decode())

    @property
    @abstractmethod
    def wgmma(self) -> bool:
        """True if plans are those of a device with wgmma, which alone runs those tiles."""

    @property
    def tiles(self) -> int:
        """How many tile shapes there are."""
        return self.library.tm_cuda_tile_count()

    def tiles_of(self, wgmma: bool) -> range:
        """The tiles of devices with or without wgmma."""
        first, count = ctypes.c_int(), ctypes.c_int()
        self.library.tm_cuda_tiles_of(wgmma, ctypes.byref(first), ctypes.byref(count))
        return range(first.value, first.value + count.value)

    def needs_tile(self, tile: int) -> None:
        """Skips the test where this device does not run the tile."""
        if not self.wgmma and tile in self.tiles_of(True):
            pytest.skip("a tile of compute capability 9.0 alone")

    def tile_channels(self, tile: int) -> int:
        """Channels that a tile covers."""
        return self.library.tm_cuda_tile_channels(tile)

    def tile_rows(self, tile: int) -> int:
        """Rows of x that a tile covers."""
        return self.library.tm_cuda_tile_rows(tile)

    def pack(
        self,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        k: int,
        bits: int,
        width: int = 4,
        gate_up: bool = False,
    ) -> Packed:
        """A checkpoint's tensors, as the CPU's packing ops take them, in the device's layout of
        `width` bits."""
        n, half = codes.shape[0], codes.shape[0] // 2
        layout = Layout(2 * (-(-half // 16) * 16) if gate_up else n, k, scale.shape[1], width)
        sizes = [ctypes.c_int64() for _ in range(3)]
        self.call("tm_cuda_pack_sizes", ctypes.byref(layout), *map(ctypes.byref, sizes))
        weight = torch.full((sizes[0].value,), -1, dtype=torch.int32, device="cpu")
        packed_scale = torch.full((sizes[1].value,), float("nan"), dtype=scale.dtype, device="cpu")
        zero = (
            None
            if zero_point is None
            else torch.full((sizes[2].value,), -1, dtype=torch.int32, device="cpu")
        )
        sums = (
            torch.full((sizes[1].value,), -1, dtype=torch.int32, device="cpu")
            if width == 8
            else None
        )
        tensors = (codes, scale, zero_point, weight, packed_scale, zero, sums)
        args = Pack(
            layout,
            0 if codes.dtype == torch.int8 else bits,
            scale.element_size(),
            half if gate_up else 0,
            *(None if t is None else t.data_ptr() for t in tensors),
        )
        self.call("tm_cuda_pack_weights", ctypes.byref(args))
        return Packed(layout, weight, packed_scale, zero, sums)

    def plan(
        self,
        layout: Layout,
        rows: int,
        multiprocessors: int = 132,
        wgmma: bool | None = None,
        scheme: str = "w4a16",
    ) -> Plan:
        """What the backend would launch on a device of so many multiprocessors; wgmma None: as this
        device has it."""
        plan = Plan()
        self.library.tm_cuda_plan_linear(
            SCHEMES.index(scheme),
            ctypes.byref(layout),
            rows,
            multiprocessors,
            self.wgmma if wgmma is None else wgmma,
            ctypes.byref(plan),
        )
        return plan

    def plan_moe_tile(self, args: Moe) -> int:
        """The tile that the backend would take for experts."""
        return self.library.tm_cuda_plan_moe_tile(ctypes.byref(args), self.wgmma)

    def choose_tiles(self, product: Tensor, choices: Tensor) -> None:
        """Numbers as csrc/cuda/c_api.h has them, int64."""
        self.library.tm_cuda_choose_tiles(product.data_ptr(), choices.data_ptr(), len(choices))

    def take_product(self, out: Tensor) -> bool:
        """Writes what the last plan was for to int64 [5], if there was one since the last call."""
        return bool(self.library.tm_cuda_take_product(ctypes.c_void_p(out.data_ptr())))

    @contextmanager
    def rows(self, x: Tensor, place: Place) -> Iterator[int]:
        """An address that holds x as `place` says."""
        wide = torch.full(
            (x.shape[0], x.shape[1] + place.pad), float("nan"), dtype=x.dtype, device="cpu"
        )
        wide[:, : x.shape[1]] = x
        with self.array("x", wide, place.shift) as address:
            assert address is not None
            yield address

    @contextmanager
    def _quantized(
        self, x: Tensor, rounding: Rounding, place: Place
    ) -> Iterator[tuple[int, int, int | None]]:
        """Addresses of the codes of x [M, K], of their scales and of their zero points."""
        rows, k = x.shape
        with ExitStack() as stack:
            enter = stack.enter_context
            scale = enter(self.array("x_scale", 4 * rows))
            zero = enter(self.array("x_zero", 4 * rows if rounding.has_zeros else None))
            codes = enter(self.array("codes", self.library.tm_cuda_code_bytes(rows, k)))
            with ExitStack() as inputs:
                enter = inputs.enter_context
                args = QuantizeX(
                    DTYPES[x.dtype],
                    rows,
                    k,
                    enter(self.rows(x, place)),
                    k + place.pad,
                    enter(self.array("given_scale", rounding.scale)),
                    enter(self.array("given_zero", rounding.zero_point)),
                    rounding.symmetric,
                    codes,
                    scale,
                    zero,
                )
                self.call("tm_cuda_quantize_x", ctypes.byref(args), None)
            assert codes is not None
            assert scale is not None
            yield codes, scale, zero

    def quantize(
        self, x: Tensor, rounding: Rounding, place: Place = Place()
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [M, K] as codes int8 [M, K], scales float32 [M, 1] and zero points int32 [M, 1]."""
        rows, k = x.shape
        with self._quantized(x, rounding, place) as (codes_at, scale_at, zero_at):
            wide = -(-k // 64) * 64
            codes = self.read(codes_at, rows, wide // _RUN, _RUN, dtype=torch.int8)
            scale = self.read(scale_at, rows, 1, dtype=torch.float32)
            zero = torch.zeros(rows, 1, dtype=torch.int32, device="cpu")
            if zero_at is not None:
                zero = self.read(zero_at, rows, 1, dtype=torch.int32)
        # Code 4t + i is that of k = 2t + 8 * (i % 2) + i // 2.
        order = [2 * (p // 4) + 8 * (p % 2) + p % 4 // 2 for p in range(_RUN)]
        plain = torch.empty_like(codes)
        plain[..., order] = codes
        assert not plain.view(rows, wide)[:, k:].any(), "codes beyond K"
        return plain.view(rows, wide)[:, :k].contiguous(), scale, zero

    def w4a16_linear(
        self,
        x: Tensor,
        packed: Packed,
        bias: Tensor | None,
        plan: Plan,
        place: Place = Place(),
        launches: int = 1,
    ) -> Tensor:
        """y [M, N] of the last of `launches` equal launches; all must give the same bits."""
        with self.rows(x, place) as x_at:

            def launch(args: Linear) -> None:
                args.x, args.x_stride = x_at, x.shape[1] + place.pad
                self.call("tm_cuda_w4a16_linear", ctypes.byref(args), ctypes.byref(plan), None)

            return self._launches(x, packed, bias, plan, place, launches, launch)

    def a8_linear(
        self,
        x: Tensor,
        packed: Packed,
        bias: Tensor | None,
        plan: Plan,
        rounding: Rounding = Rounding(),
        place: Place = Place(),
        launches: int = 1,
    ) -> Tensor:
        """The same with x rounded to codes first: W4A8 or W8A8, as the weights are."""
        sums = packed.sums if rounding.has_zeros else None
        with (
            self._quantized(x, rounding, place) as (codes, scale, zero),
            self.array("weight_sum", sums) as sums_at,
        ):

            def launch(args: Linear) -> None:
                args.x = codes
                wide = LinearA8(args, DTYPES[packed.scale.dtype], scale, zero, sums_at)
                self.call("tm_cuda_a8_linear", ctypes.byref(wide), ctypes.byref(plan), None)

            return self._launches(x, packed, bias, plan, place, launches, launch)

    def _launches(
        self,
        x: Tensor,
        packed: Packed,
        bias: Tensor | None,
        plan: Plan,
        place: Place,
        launches: int,
        launch: Callable[[Linear], None],
    ) -> Tensor:
        rows, n = x.shape[0], packed.layout.n
        sizes = (ctypes.byref(plan), ctypes.byref(packed.layout), rows)
        sums = self.library.tm_cuda_sums_bytes(*sizes)
        arrived = self.library.tm_cuda_arrived_words(*sizes)
        counters = torch.zeros(arrived, dtype=torch.int32, device="cpu") if arrived else None
        result: Tensor | None = None
        with ExitStack() as stack:
            enter = stack.enter_context
            args = Linear(packed.layout, DTYPES[x.dtype], rows, None, 0)
            args.weight = enter(self.array("weight", packed.weight))
            args.scale = enter(self.array("scale", packed.scale))
            args.zero = enter(self.array("zero", packed.zero))
            args.bias = enter(self.array("bias", bias))
            args.sums = enter(self.array("sums", sums or None))
            args.arrived = enter(self.array("arrived", counters))
            args.y_stride = n + place.pad
            for _ in range(launches):
                with self.array("y", rows * (n + place.pad) * 2, place.shift) as y_at:
                    assert y_at is not None
                    args.y = y_at
                    launch(args)
                    words = self.read(y_at, rows, n + place.pad, dtype=torch.int16)
                assert (words[:, n:] == -1).all(), "y was written beside its rows"
                assert result is None or torch.equal(words, result), "two launches differ"
                result = words
            if counters is not None:
                counters = self.read(args.arrived, arrived, dtype=torch.int32)
                assert not counters.any(), "a counter was not set back"
        assert result is not None
        return result[:, :n].contiguous().view(x.dtype)
