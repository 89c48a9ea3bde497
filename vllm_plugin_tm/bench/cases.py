# SPDX-License-Identifier: Apache-2.0
"""What is measured: shapes, batch sizes and formats, and what each moves and computes. No torch."""

from dataclasses import dataclass
from itertools import product

from vllm_plugin_tm.quantization.support_matrix import CHANNEL

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (2048, 2048), (8192, 2048), (576, 576))
"""N x K: the projections of Llama-3-8B and Llama-3.2-1B, and one of SmolLM2-135M."""
BATCHES = tuple(2**i for i in range(11))
GROUP_SIZES = (32, 64, 128, CHANNEL)
DTYPES = ("bf16", "f16", "f32")

# What a run without options measures: every batch at the usual format, and the other formats where
# they could differ: decode, a small batch, the turn to prefill, prefill.
USUAL_GROUP = 128
_OTHER_BATCHES = (1, 4, 16, 128)
# --quick: one large, one middle and one small matrix, once per regime.
_QUICK_SHAPES = ((4096, 4096), (2048, 2048), (576, 576))
_QUICK_BATCHES = (1, 4, 16, 128)

OURS, OURS_SYMMETRIC, UPSTREAM, TORCH = "tm", "tm-symmetric", "upstream", "torch"
KERNELS = (OURS, UPSTREAM, TORCH)
"""What can be asked for; OURS_SYMMETRIC comes by itself beside an asymmetric case."""

_DTYPE_BYTES = {"bf16": 2, "f16": 2, "f32": 4}


@dataclass(frozen=True)
class Format:
    """How a weight matrix is stored and in which dtype its activations come.

    `group_size` is along K, CHANNEL for one group; `dtype` one of DTYPES.
    """

    group_size: int = USUAL_GROUP
    symmetric: bool = True
    dtype: str = "bf16"

    @property
    def group_name(self) -> str:
        return "channel" if self.group_size == CHANNEL else str(self.group_size)

    @property
    def name(self) -> str:
        symmetry = "symmetric" if self.symmetric else "asymmetric"
        return f"group {self.group_name}, {symmetry}, {self.dtype}"


@dataclass(frozen=True)
class Case:
    """One linear layer [n, k] applied to m rows."""

    n: int
    k: int
    m: int
    format: Format

    @property
    def flops(self) -> int:
        """Multiplications and additions of the product, scaling not counted."""
        return 2 * self.m * self.n * self.k

    @property
    def activation_bytes(self) -> int:
        """x [m, k] read once and y [m, n] written once."""
        return self.m * (self.k + self.n) * _DTYPE_BYTES[self.format.dtype]


def fits(n: int, k: int, group_size: int) -> bool:
    """Whether a [n, k] matrix can be cut into such groups (all cases use n and k that are
    multiples of 8, as the packed format wants whole words)."""
    return n % 8 == 0 and k % 8 == 0 and (group_size == CHANNEL or k % group_size == 0)


def default_cases(dtype: str = "bf16") -> list[Case]:
    """The run without options: see USUAL_GROUP."""
    usual = Format(dtype=dtype)
    others = [Format(group, True, dtype) for group in GROUP_SIZES if group != USUAL_GROUP]
    others.append(Format(USUAL_GROUP, False, dtype))
    cases = [Case(n, k, m, usual) for (n, k), m in product(SHAPES, BATCHES)]
    cases += [Case(n, k, m, f) for (n, k), f, m in product(SHAPES, others, _OTHER_BATCHES)]
    return _runnable(cases)


def quick_cases(dtype: str = "bf16") -> list[Case]:
    """The run with --quick."""
    usual = Format(dtype=dtype)
    return _runnable([Case(n, k, m, usual) for (n, k), m in product(_QUICK_SHAPES, _QUICK_BATCHES)])


def chosen_cases(
    shapes: tuple[tuple[int, int], ...] | None,
    batches: tuple[int, ...] | None,
    group_sizes: tuple[int, ...] | None,
    symmetries: tuple[bool, ...],
    dtypes: tuple[str, ...],
    quick: bool = False,
) -> list[Case]:
    """Every combination of what was asked for; None means the default of a full or quick run.

    Raises:
        ValueError: a shape that cannot be cut into groups of an asked-for size.
    """
    asked = group_sizes is not None
    shapes = shapes or (_QUICK_SHAPES if quick else SHAPES)
    batches = batches or (_QUICK_BATCHES if quick else BATCHES)
    group_sizes = group_sizes or (USUAL_GROUP,)
    formats = [Format(*f) for f in product(group_sizes, symmetries, dtypes)]
    cases = [Case(n, k, m, f) for (n, k), f, m in product(shapes, formats, batches)]
    for case in cases if asked else ():
        if not fits(case.n, case.k, case.format.group_size):
            raise ValueError(
                f"shape {case.n}x{case.k} with group size {case.format.group_name}: N must be a "
                f"multiple of 8 and K={case.k} of 8 and of the group size"
            )
    return _runnable(cases)


def _runnable(cases: list[Case]) -> list[Case]:
    """The usual group where it fits, else the largest that does: 64 for K = 576."""
    return list(dict.fromkeys(_fitted(case) for case in cases))


def _fitted(case: Case) -> Case:
    form = case.format
    if fits(case.n, case.k, form.group_size):
        return case
    group = next((g for g in (128, 64, 32) if case.k % g == 0), CHANNEL)
    return Case(case.n, case.k, case.m, Format(group, form.symmetric, form.dtype))
