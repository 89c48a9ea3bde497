# SPDX-License-Identifier: Apache-2.0
"""What the machine can do at best, measured by the extension's own loops: read bandwidth and
multiply-adds per second, all threads."""

import contextlib
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_plugin_tm.bench import timing
from vllm_plugin_tm.bench.cases import Format

if TYPE_CHECKING:
    import torch

LOOPS = ("bf16", "int8", "fma32", "amx_bf16", "amx_int8", "amx_bf16_l2", "amx_int8_l2")
"""The loops that the extension has. Those with `l2` load their tiles as a GEMM does whose
activations lie in the second-level cache: no kernel is judged by them, they say what is left."""
DOT_KINDS = (*LOOPS, "amx_f16", "amx_f16_l2")
# Tiles multiply no fp16: split exactly into two bf16 parts it needs two of their products.
_TWICE = {"amx_f16": "amx_bf16", "amx_f16_l2": "amx_bf16_l2"}
# The instructions for a product, by what it multiplies: the first that there is bounds it; of bf16
# the faster one, since products of fp32 are as good, and some processors' bf16 dot is slower. fp16
# has no dot of its own on x86 without AVX512-FP16; split exactly into bf16 pairs it needs two bf16
# dots, the rate of the fp32 multiply-add. Without a byte dot, integers are multiplied as 16-bit
# pairs, up to twice the rate of the fp32 multiply-add: a yardstick, no limit.
_DOT_OF = {
    "int8": ("int8", "fma32"),
    "bf16": ("bf16", "fma32"),
    "f16": ("fma32",),
    "f32": ("fma32",),
}
# Of AMX, for a kernel that may use it: fp32 has none.
_TILE_OF = {"int8": "amx_int8", "bf16": "amx_bf16", "f16": "amx_f16"}
_DOT_ITERATIONS = 200_000  # 16 independent instructions each: about a millisecond
_TILE_ITERATIONS = 10_000  # an instruction takes 16 cycles
_EFFORT = timing.Effort(sample_s=0.004, case_s=0.2, rounds=(7, 31))


@dataclass(frozen=True)
class Limits:
    """The machine's limits at one moment. GB/s are 1e9 bytes, GFLOP/s count a multiply-add as two;
    `dot_gflops` has 0.0 for an instruction that this processor lacks.

    `read_gbps` is from huge pages where the system gives them: the most that memory yields.
    `read_small_pages_gbps` is from memory as an ordinary allocation has it.
    """

    read_gbps: float
    read_small_pages_gbps: float
    dot_gflops: dict[str, float]


def dot_kind(form: Format, rates: Mapping[str, float], tiles: bool = False) -> str:
    """The instruction that bounds products in this format. `rates` are Limits.dot_gflops; `tiles`:
    those of AMX count where the processor has them.

    Raises:
        ValueError: the processor has none of them.
    """
    operands = "int8" if form.facts.integer_activations else form.dtype
    if form.facts.floats and form.facts.rounds_activations:
        operands = "bf16"  # e4m3 is exact in it, whatever x was
    if tiles and operands in _TILE_OF and rates[_TILE_OF[operands]]:
        return _TILE_OF[operands]
    kinds = [kind for kind in _DOT_OF[operands] if rates[kind]]
    if kinds:
        return max(kinds, key=lambda kind: rates[kind]) if operands == "bf16" else kinds[0]
    raise ValueError(
        f"this processor has none of the instructions {_DOT_OF[operands]} for {operands}"
    )


def with_loads(kind: str) -> str | None:
    """The kind that is the same product with its operands' loads; None where there is none."""
    loads = f"{kind}_l2"
    return loads if loads in DOT_KINDS else None


def drift(before: Limits, after: Limits) -> dict[str, float]:
    """Relative change of each limit over a run: 0.02 means 2 % more at the end."""
    changes = {"read": after.read_gbps / before.read_gbps - 1}
    for kind, value in before.dot_gflops.items():
        if value:
            changes[kind] = after.dot_gflops[kind] / value - 1
    return changes


class LimitLoops:
    """The loops, and the buffers that they read. `llc_bytes` as in machine.Machine.

    Needs the extension (kernels.ops.load()).
    """

    def __init__(self, llc_bytes: int) -> None:
        size = buffer_bytes(llc_bytes)
        self._huge = _buffer(size, huge=True)
        self._small = _buffer(size, huge=False)
        self._multiply_adds: dict[str, int] = {}

    def read(self) -> object:
        """One pass over the buffer: `read_bytes` bytes."""
        return _ops().limit_read(self._huge)

    @property
    def read_bytes(self) -> int:
        return self._huge.numel()

    def dot(self, kind: str) -> Callable[[], int]:
        """A step of `dot_flops(kind)` floating-point (or integer) operations."""
        loop = _TWICE.get(kind, kind)
        iterations = _TILE_ITERATIONS if loop.startswith("amx") else _DOT_ITERATIONS
        return lambda: _ops().limit_dot(loop, iterations)

    def dot_flops(self, kind: str) -> int:
        """Operations of one step, a multiply-add as two; 0 where the instruction is missing."""
        if kind not in self._multiply_adds:
            self._multiply_adds[kind] = int(self.dot(kind)())
        return 2 * self._multiply_adds[kind] // (2 if kind in _TWICE else 1)

    def measure(self) -> Limits:
        """All limits now, in under two seconds."""
        steps: dict[str, timing.Step] = {
            "read": self.read,
            "read_small": lambda: _ops().limit_read(self._small),
        }
        steps |= {kind: self.dot(kind) for kind in DOT_KINDS if self.dot_flops(kind)}
        times = timing.time_in_turns(steps, _EFFORT)
        return Limits(
            read_gbps=self.read_bytes / times["read"].median / 1e9,
            read_small_pages_gbps=self.read_bytes / times["read_small"].median / 1e9,
            dot_gflops={
                kind: self.dot_flops(kind) / times[kind].median / 1e9 if kind in times else 0.0
                for kind in DOT_KINDS
            },
        )


def buffer_bytes(llc_bytes: int) -> int:
    """Four times the last-level cache, so that next to nothing of the last pass is left in it."""
    page = 2 * 2**20
    return -(-4 * llc_bytes // page) * page


def _buffer(size: int, huge: bool) -> "torch.Tensor":
    import torch

    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A kernel without huge pages refuses: both buffers are alike then, and the two figures say so.
    with contextlib.suppress(OSError):
        area.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    buffer = torch.frombuffer(area, dtype=torch.uint8)
    buffer.fill_(1)  # pages exist only once written; before, all are the same page of zeros
    return buffer


def _ops():  # type: ignore[no-untyped-def]  # torch's namespace of operators has no static type
    import torch

    return torch.ops.vllm_plugin_tm
