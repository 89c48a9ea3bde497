# SPDX-License-Identifier: Apache-2.0
"""How fast the kernels must be, and by how much a run reaches or misses it. Goals do not move."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

from vllm_plugin_tm.bench.cases import OURS, OURS_SYMMETRIC, TORCH, UPSTREAM
from vllm_plugin_tm.bench.results import PackRow, Report, Row

LARGE = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 2048))
"""N x K of the matrices that the goals are about."""


@dataclass(frozen=True)
class Goal:
    """`must` and `aim` are least values of a figure (None: no such value); `percent` says how to
    write it."""

    name: str
    must: float | None
    aim: float | None
    percent: bool = False

    def written(self, value: float | None) -> str:
        """A value of this figure as text."""
        if value is None:
            return ""
        return f"{value * 100:.0f} %" if self.percent else f"{value:.2f}"


@dataclass(frozen=True)
class Outcome:
    """What a run says of a goal: the figure of every case, with the case in words."""

    goal: Goal
    figures: tuple[tuple[float, str], ...]

    @property
    def worst(self) -> tuple[float, str]:
        return min(self.figures)

    @property
    def median(self) -> float:
        return median(value for value, _ in self.figures)

    @property
    def reached(self) -> int:
        """How many cases reach `must`, or `aim` where nothing must be."""
        wanted = self.goal.must if self.goal.must is not None else self.goal.aim
        return sum(value >= (wanted or 0.0) for value, _ in self.figures)


@dataclass(frozen=True)
class _OfRows:
    goal: Goal
    batches: Callable[[int], bool]
    figure: Callable[[Row], float | None]


def _over(peer: str) -> Callable[[Row], float | None]:
    return lambda row: row.speedups.get(peer)


_ZENTORCH = "zentorch"
_KERNEL_GOALS = (
    _OfRows(
        Goal("M=1: of read bandwidth", 0.80, 0.92, percent=True),
        lambda m: m == 1,
        lambda row: row.bandwidth_fraction,
    ),
    _OfRows(Goal("M=1: times upstream", 5.0, None), lambda m: m == 1, _over(UPSTREAM)),
    _OfRows(
        Goal("M=4: of read bandwidth", 0.65, 0.85, percent=True),
        lambda m: m == 4,
        lambda row: row.bandwidth_fraction,
    ),
    _OfRows(Goal("M=4: times upstream", 4.0, None), lambda m: m == 4, _over(UPSTREAM)),
    _OfRows(Goal("M=16: times upstream", 2.3, None), lambda m: m == 16, _over(UPSTREAM)),
    _OfRows(Goal("M=16: times zentorch", 1.0, None), lambda m: m == 16, _over(_ZENTORCH)),
    _OfRows(
        Goal("M=16: of the dot peak", None, 0.80, percent=True),
        lambda m: m == 16,
        lambda row: row.dot_fraction,
    ),
    _OfRows(
        Goal("M>=128: of the dot peak", 0.85, 0.95, percent=True),
        lambda m: m >= 128,
        lambda row: row.dot_fraction,
    ),
    _OfRows(Goal("M>=128: times torch bf16", 1.0, None), lambda m: m >= 128, _over(TORCH)),
    _OfRows(Goal("M>=128: times zentorch", 1.0, None), lambda m: m >= 128, _over(_ZENTORCH)),
    _OfRows(
        Goal("asymmetric: speed over symmetric", 0.95, 1.0),
        lambda m: True,
        _over(OURS_SYMMETRIC),
    ),
)
_PACKING = Goal("packing: GB/s of 4-bit data", 1.0, None)
_RESIDENT = Goal("packing: disk over resident bytes", 1 / 1.05, None)

# Ratio of the plugin to an engine of end_to_end.py: (what, engine) -> goal.
_END_TO_END = {
    ("decode", "upstream W4A16"): Goal("decode: times upstream W4A16", 3.5, None),
    ("decode", "upstream bf16"): Goal("decode: times upstream bf16", 1.8, None),
    ("decode", "llama.cpp Q4_0"): Goal("decode: times llama.cpp Q4_0", None, 1.0),
    ("prefill", "upstream W4A16"): Goal("prefill: times upstream W4A16", 1.7, None),
    ("prefill", "upstream bf16"): Goal("prefill: times upstream bf16", 1.0, None),
    ("prefill", "llama.cpp Q4_0"): Goal("prefill: times llama.cpp Q4_0", None, 1.6),
}


def of_kernels(reports: Iterable[Report]) -> list[Outcome]:
    """Outcomes of all goals that the reports have figures for, bf16 on the best instruction set."""
    reports = list(reports)
    rows = [row for report in reports for row in _judged(report)]
    packs = [pack for report in reports for pack in report.packing if (pack.n, pack.k) in LARGE]
    outcomes = []
    for of in _KERNEL_GOALS:
        found = [(of.figure(row), _words(row)) for row in rows if of.batches(row.m)]
        outcomes.append(Outcome(of.goal, tuple((v, w) for v, w in found if v is not None)))
    outcomes.append(Outcome(_PACKING, tuple((p.gbps, _words(p)) for p in packs)))
    outcomes.append(Outcome(_RESIDENT, tuple((1 / p.resident_ratio, _words(p)) for p in packs)))
    return [outcome for outcome in outcomes if outcome.figures]


def of_engines(plugin_over: dict[str, dict[str, float]]) -> list[Outcome]:
    """Outcomes from the ratios of an end_to_end.py report."""
    return [
        Outcome(goal, ((plugin_over[engine][what], "Llama-1B shapes"),))
        for (what, engine), goal in _END_TO_END.items()
        if engine in plugin_over
    ]


def _judged(report: Report) -> list[Row]:
    own = [r for r in report.rows if r.kernel == OURS and r.dtype == "bf16"]
    best = own[0].isa if own else ""
    return [r for r in own if r.isa == best and (r.n, r.k) in LARGE]


def _words(row: Row | PackRow) -> str:
    batch = f", M={row.m}" if isinstance(row, Row) else ""
    return f"{row.n} x {row.k}{batch}, {row.format.name}"
