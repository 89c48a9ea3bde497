# SPDX-License-Identifier: Apache-2.0
"""What is measured: shapes, batch sizes and formats, and what each moves and computes. No torch."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product

from vllm_plugin_tm.bench.schemes import DEFAULT_SCHEMES, SCHEMES, USUAL_SCHEME, Scheme
from vllm_plugin_tm.quantization.support_matrix import CHANNEL

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (2048, 2048), (8192, 2048), (576, 576))
"""N x K: the projections of Llama-3-8B and Llama-3.2-1B, and one of SmolLM2-135M."""
LARGE = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 2048))
"""Those that the goals are about."""
BATCHES = tuple(2**i for i in range(11))
DTYPES = ("bf16", "f16", "f32")

# What a run without options measures: every batch at a scheme's usual format, and its other formats
# where they could differ: decode, a small batch, the turn to prefill, prefill. The usual scheme's
# on all large shapes, the others' on two: a run has to end in about ten minutes.
_OTHER_BATCHES = (1, 4, 16, 256)
_OTHER_SHAPES = LARGE[:2]
# --quick: one large, one middle and one small matrix, once per regime.
_QUICK_SHAPES = ((4096, 4096), (2048, 2048), (576, 576))
_QUICK_BATCHES = (1, 4, 16, 128)

OURS, OURS_SYMMETRIC, UPSTREAM, UPSTREAM_W8A8, UPSTREAM_BF16, TORCH = (
    "tm",
    "tm-symmetric",
    "upstream",
    "upstream-w8a8",
    "upstream-bf16",
    "torch",
)
KERNELS = (OURS, UPSTREAM, UPSTREAM_W8A8, UPSTREAM_BF16, TORCH)
"""What can be asked for, each measured where it exists: upstream-w8a8 beside W4A8, upstream-bf16
and tm on routed experts. OURS_SYMMETRIC comes by itself beside an asymmetric case."""

DTYPE_BYTES = {"bf16": 2, "f16": 2, "f32": 4}


@dataclass(frozen=True)
class Format:
    """How a weight matrix is stored, in which dtype its activations come and what becomes of them.

    `group_size` is along K, CHANNEL for one group; `symmetric` as schemes.Scheme says; `dtype` one
    of DTYPES; `scheme` one of SCHEMES.
    """

    group_size: int = SCHEMES[USUAL_SCHEME].usual_group
    symmetric: bool = True
    dtype: str = "bf16"
    scheme: str = USUAL_SCHEME

    @property
    def facts(self) -> Scheme:
        return SCHEMES[self.scheme]

    @property
    def group_name(self) -> str:
        return "channel" if self.group_size == CHANNEL else str(self.group_size)

    @property
    def name(self) -> str:
        parts = [self.facts.title, f"group {self.group_name}"]
        if not self.facts.floats:  # they have no zero points
            parts.append("symmetric" if self.symmetric else "asymmetric")
        return ", ".join([*parts, self.dtype])


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
        """x [m, k] read once and y [m, n] written once, both in the activations' dtype: integers
        that an op makes of x never leave it."""
        return self.m * (self.k + self.n) * DTYPE_BYTES[self.format.dtype]


def fits(n: int, k: int, group_size: int) -> bool:
    """Whether a [n, k] matrix can be cut into such groups (all cases use n and k that are
    multiples of 8, as the packed format wants whole words)."""
    return n % 8 == 0 and k % 8 == 0 and (group_size == CHANNEL or k % group_size == 0)


def default_cases(schemes: Iterable[str] = DEFAULT_SCHEMES, dtype: str = "bf16") -> list[Case]:
    """The run without options: every shape and batch size at each scheme's usual format, large
    shapes at some batch sizes in its others."""
    cases = []
    for scheme in (SCHEMES[name] for name in schemes):
        usual = Format(scheme.usual_group, True, dtype, scheme.name)
        others = [Format(group, even, dtype, scheme.name) for group, even in scheme.other_formats]
        cases += [Case(n, k, m, usual) for (n, k), m in product(SHAPES, BATCHES)]
        shapes = LARGE if scheme.name == USUAL_SCHEME else _OTHER_SHAPES
        cases += [Case(n, k, m, f) for (n, k), f, m in product(shapes, others, _OTHER_BATCHES)]
    return _runnable(cases)


def chosen_cases(
    schemes: Iterable[str],
    shapes: tuple[tuple[int, int], ...] | None = None,
    batches: tuple[int, ...] | None = None,
    group_sizes: tuple[int, ...] | None = None,
    symmetries: tuple[bool, ...] = (True,),
    dtypes: tuple[str, ...] = ("bf16",),
    quick: bool = False,
) -> list[Case]:
    """Every combination of what was asked for; None means the default of a full or quick run.

    Raises:
        ValueError: a shape that cannot be cut into groups of an asked-for size, or a scheme that
            has no such groups or zero points.
    """
    shapes = shapes or (_QUICK_SHAPES if quick else SHAPES)
    batches = batches or (_QUICK_BATCHES if quick else BATCHES)
    cases = []
    for scheme in (SCHEMES[name] for name in schemes):
        groups = group_sizes or (scheme.usual_group,)
        evenness = those_of(scheme, symmetries)
        formats = [Format(*f, scheme.name) for f in product(groups, evenness, dtypes)]
        cases += [Case(n, k, m, f) for (n, k), f, m in product(shapes, formats, batches)]
    for case in cases if group_sizes else ():
        _check_group(case)
    return _runnable(cases)


def those_of(scheme: Scheme, symmetries: tuple[bool, ...]) -> tuple[bool, ...]:
    """What there is of `symmetries` in a scheme: small floats have no zero points.

    Raises:
        ValueError: nothing.
    """
    if not scheme.floats:
        return symmetries
    if True not in symmetries:
        raise ValueError(f"scheme {scheme.name}: small floats have no zero points")
    return (True,)


def _check_group(case: Case) -> None:
    form = case.format
    groups = form.facts.groups
    if groups == (CHANNEL,) and form.group_size != CHANNEL:
        raise ValueError(
            f"scheme {form.scheme} with group size {form.group_name}: its weights have one scale "
            "per output channel, so the only group size is channel"
        )
    if groups and form.group_size not in groups:
        raise ValueError(
            f"scheme {form.scheme} with group size {form.group_name}: the format's group size is "
            f"{groups[0]}"
        )
    if not fits(case.n, case.k, form.group_size):
        raise ValueError(
            f"shape {case.n}x{case.k} with group size {form.group_name}: N must be a multiple of 8 "
            f"and K={case.k} of 8 and of the group size"
        )


def _runnable(cases: list[Case]) -> list[Case]:
    """The usual group where it fits, else the largest that does: 64 for K = 576."""
    return list(dict.fromkeys(_fitted(case) for case in cases))


def _fitted(case: Case) -> Case:
    if fits(case.n, case.k, case.format.group_size):
        return case
    if case.format.facts.groups:
        _check_group(case)  # the format has no other size
    group = next((g for g in (128, 64, 32) if case.k % g == 0), CHANNEL)
    return replace(case, format=replace(case.format, group_size=group))
