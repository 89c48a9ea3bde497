# SPDX-License-Identifier: Apache-2.0
"""How fast the kernels must be, and by how much a run reaches or misses it. Goals do not move."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from vllm_plugin_tm.bench.cases import (
    LARGE,
    OURS,
    OURS_SYMMETRIC,
    TORCH,
    UPSTREAM,
    UPSTREAM_BF16,
    UPSTREAM_W8A8,
)
from vllm_plugin_tm.bench.figures import Figures
from vllm_plugin_tm.bench.results import PackRow, Report
from vllm_plugin_tm.bench.schemes import FAMILIES

F = TypeVar("F", bound=Figures)


@dataclass(frozen=True)
class Goal:
    """`must` and `aim` are least values of a figure of a scheme (None: no such value); `percent`
    says how to write it."""

    scheme: str
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
    """`rows` says which of our bf16 rows count; LARGE matrices only, unless `every_shape`. Routed
    experts: all layers. `amx`: the instruction set is AMX, else another one; goals that compare
    with the memory hold for all."""

    goal: Goal
    rows: Callable[[Figures], bool]
    figure: Callable[[Figures], float | None]
    every_shape: bool = False
    amx: bool = False

    def counts(self, row: Figures) -> bool:
        """Whether the goal is about this row."""
        isa = self.figure is _read or self.amx == (row.isa == "amx")
        return isa and row.scheme == self.goal.scheme and self.rows(row)


def _at(m: int) -> Callable[[Figures], bool]:
    return lambda row: row.m == m


def _between(least: int, most: int) -> Callable[[Figures], bool]:
    return lambda row: least <= row.m <= most


def _from(m: int, group_size: int | None = None) -> Callable[[Figures], bool]:
    return lambda row: row.m >= m and group_size in (None, row.group_size)


def _any(row: Figures) -> bool:
    return True


def _over(peer: str) -> Callable[[Figures], float | None]:
    return lambda row: row.speedups.get(peer)


def _read(row: Figures) -> float:
    return row.bandwidth_fraction


def _dot(row: Figures) -> float:
    return row.dot_fraction


_ZENTORCH = "zentorch"
_W4A16 = (
    _OfRows(Goal("w4a16", "M=1: of read bandwidth", 0.80, 0.92, True), _at(1), _read),
    _OfRows(Goal("w4a16", "M=1: times upstream", 5.0, None), _at(1), _over(UPSTREAM)),
    _OfRows(Goal("w4a16", "M=4: of read bandwidth", 0.65, 0.85, True), _at(4), _read),
    _OfRows(Goal("w4a16", "M=4: times upstream", 4.0, None), _at(4), _over(UPSTREAM)),
    _OfRows(Goal("w4a16", "M=16: times upstream", 2.3, None), _at(16), _over(UPSTREAM)),
    _OfRows(Goal("w4a16", "M=16: times zentorch", 1.0, None), _at(16), _over(_ZENTORCH)),
    _OfRows(Goal("w4a16", "M=16: of the dot peak", None, 0.80, True), _at(16), _dot),
    _OfRows(Goal("w4a16", "M>=128: of the dot peak", 0.85, 0.95, True), _from(128), _dot),
    _OfRows(Goal("w4a16", "M>=128: times torch bf16", 1.0, None), _from(128), _over(TORCH)),
    _OfRows(Goal("w4a16", "M>=128: times zentorch", 1.0, None), _from(128), _over(_ZENTORCH)),
    _OfRows(
        Goal("w4a16", "asymmetric: speed over symmetric", 0.95, 1.0), _any, _over(OURS_SYMMETRIC)
    ),
)
_PACKING = Goal("w4a16", "packing: GB/s of 4-bit data", 1.0, None)
_RESIDENT = Goal("w4a16", "packing: disk over resident bytes", 1 / 1.05, None)
_OTHERS = (
    _OfRows(Goal("w8a16", "M=1: of read bandwidth", 0.85, 0.95, True), _at(1), _read),
    _OfRows(Goal("w4a8", "M=1: of read bandwidth", 0.80, 0.92, True), _at(1), _read),
    _OfRows(Goal("w4a8", "M=1: times upstream", 60.0, None), _at(1), _over(UPSTREAM)),
    _OfRows(Goal("w4a8", "every M: times zentorch", 1.0, 1.15), _any, _over(_ZENTORCH)),
    _OfRows(
        Goal("w4a8", "M>=256, group 128: of the dot peak", 0.85, 0.95, True), _from(256, 128), _dot
    ),
    _OfRows(
        Goal("w4a8", "M>=256, group 32: of the dot peak", 0.70, 0.85, True), _from(256, 32), _dot
    ),
    _OfRows(Goal("w8a8", "M=1: of read bandwidth", 0.85, 0.95, True), _at(1), _read),
    _OfRows(Goal("w8a8", "M=1: times upstream", 1.1, None), _at(1), _over(UPSTREAM)),
    _OfRows(
        Goal("w8a8", "every M and shape: times upstream", 1.0, 1.15),
        _any,
        _over(UPSTREAM),
        every_shape=True,
    ),
    _OfRows(Goal("w8a8", "M>=256: of the dot peak", 0.90, 0.97, True), _from(256), _dot),
)
_FLOATS = (
    *(
        _OfRows(goal, rows, figure)
        for scheme in FAMILIES["fp8"]
        for goal, rows, figure in (
            (Goal(scheme, "M=1: of read bandwidth", 0.80, 0.92, True), _at(1), _read),
            (Goal(scheme, "M>=128: of the dot peak", 0.80, 0.92, True), _from(128), _dot),
        )
    ),
    # Upstream has a kernel for this one only.
    _OfRows(Goal("fp8-w8a8", "M=1: times upstream", 2.0, None), _at(1), _over(UPSTREAM)),
    *(
        _OfRows(Goal(scheme, "M=1: of read bandwidth", 0.75, 0.90, True), _at(1), _read)
        for scheme in FAMILIES["fp4"]
    ),
)

# Of routed experts: bytes are those of the experts touched; T=1 and a few tokens are bound by
# memory, where bf16 has four or two times as much to read.
_EXPERTS = tuple(
    _OfRows(Goal(scheme, f"experts, {name}", must, aim, percent), rows, figure)
    for scheme, over_one, over_few, of_dot in (
        ("w4a16", 3.0, 2.5, 0.70),
        ("w4a8", 3.0, 2.5, 0.65),
        ("w8a8", 1.7, 1.6, 0.65),
    )
    for name, must, aim, percent, rows, figure in (
        ("T=1: of read bandwidth", 0.75, 0.90, True, _at(1), _read),
        ("T=1: times upstream bf16", over_one, None, False, _at(1), _over(UPSTREAM_BF16)),
        (
            "T=16 to 64: times upstream bf16",
            over_few,
            None,
            False,
            _between(16, 64),
            _over(UPSTREAM_BF16),
        ),
        ("T=1024: of the dot peak", of_dot, 0.85, True, _at(1024), _dot),
    )
) + tuple(
    _OfRows(Goal(scheme, "experts, T=1: of read bandwidth", 0.70, 0.85, True), _at(1), _read)
    for family in FAMILIES.values()
    for scheme in family
)

# On AMX. Upstream's W4A8 is a reference loop there too: W4A8 is compared with its W8A8.
_ON_AMX = (
    _OfRows(
        Goal("w4a16", "AMX, M>=256: times torch bf16", 1.5, None),
        _from(256),
        _over(TORCH),
        amx=True,
    ),
    *(
        _OfRows(Goal(scheme, f"AMX, {name}", must, aim, percent), rows, figure, amx=True)
        for scheme, upstream, over_upstream in (
            ("w4a16", UPSTREAM, None),
            ("w4a8", UPSTREAM_W8A8, 1.2),
            ("w8a8", UPSTREAM, 1.2),
        )
        for name, must, aim, percent, rows, figure in (
            (f"M=1: times {upstream}", 1.0, None, False, _at(1), _over(upstream)),
            (f"M=16 to 64: times {upstream}", 1.0, 1.3, False, _between(16, 64), _over(upstream)),
            ("M>=256: of the tile peak", 0.60, 0.80, True, _from(256), _dot),
            (f"M>=256: times {upstream}", 1.0, over_upstream, False, _from(256), _over(upstream)),
        )
    ),
)
_EXPERTS_ON_AMX = tuple(
    _OfRows(
        Goal(scheme, f"AMX, experts, T=1024: {name}", must, aim, percent),
        _at(1024),
        figure,
        amx=True,
    )
    for scheme in ("w4a16", "w4a8", "w8a8")
    for name, must, aim, percent, figure in (
        ("of the tile peak", 0.50, 0.70, True, _dot),
        ("times upstream", 1.0, None, False, _over(UPSTREAM)),
    )
)

# Ratio of an engine of end_to_end.py with the plugin to another: (plugin's, what, other) -> goal.
_END_TO_END = {
    ("plugin W4A16", "decode", "upstream W4A16"): (3.5, None),
    ("plugin W4A16", "decode", "upstream bf16"): (1.8, None),
    ("plugin W4A16", "decode", "llama.cpp Q4_0"): (None, 1.0),
    ("plugin W4A16", "prefill", "upstream W4A16"): (1.7, None),
    ("plugin W4A16", "prefill", "upstream bf16"): (1.0, None),
    ("plugin W4A16", "prefill", "llama.cpp Q4_0"): (None, 1.6),
    ("plugin W8A8", "decode", "upstream W8A8"): (1.1, None),
    ("plugin W4A8", "decode", "upstream W8A8"): (1.5, None),
    ("plugin W4A8", "prefill", "upstream W8A8"): (1.3, None),
    ("plugin tm_w4a16 with head", "decode", "plugin tm_w4a16"): (1.15, None),
}


def of_kernels(reports: Iterable[Report]) -> list[Outcome]:
    """Outcomes of all goals that the reports have figures for, bf16 on the best instruction set."""
    reports = list(reports)
    every = [row for report in reports for row in _judged(report.rows)]
    large = [row for row in every if (row.n, row.k) in LARGE]
    packs = [
        pack
        for report in reports
        for pack in report.packing
        if pack.scheme == _PACKING.scheme and (pack.n, pack.k) in LARGE
    ]
    outcomes = [_outcome(of, large) for of in _W4A16]
    outcomes.append(Outcome(_PACKING, tuple((p.gbps, _words(p)) for p in packs)))
    outcomes.append(Outcome(_RESIDENT, tuple((1 / p.resident_ratio, _words(p)) for p in packs)))
    others = (*_OTHERS, *_FLOATS, *_ON_AMX)
    outcomes += [_outcome(of, every if of.every_shape else large) for of in others]
    return [outcome for outcome in outcomes if outcome.figures]


def of_experts(report: Report) -> list[Outcome]:
    """Outcomes of the goals of routed experts that the report has figures for."""
    outcomes = [_outcome(of, _judged(report.moe)) for of in (*_EXPERTS, *_EXPERTS_ON_AMX)]
    return [outcome for outcome in outcomes if outcome.figures]


def _outcome(of: _OfRows, rows: Sequence[Figures]) -> Outcome:
    found = [(of.figure(row), _words(row)) for row in rows if of.counts(row)]
    return Outcome(of.goal, tuple((value, words) for value, words in found if value is not None))


def of_engines(plugin_over: dict[str, dict[str, dict[str, float]]]) -> list[Outcome]:
    """Outcomes from the ratios of an end_to_end.py report."""
    outcomes = []
    for (own, what, other), (must, aim) in _END_TO_END.items():
        ratio = plugin_over.get(own, {}).get(other)
        if ratio:
            scheme = own.split()[1].lower()
            goal = Goal(scheme, f"{what}: times {other}", must, aim)
            outcomes.append(Outcome(goal, ((ratio[what], "Llama-1B shapes"),)))
    return outcomes


def _judged(rows: Iterable[F]) -> list[F]:
    own = [r for r in rows if r.kernel == OURS and r.dtype == "bf16"]
    best = own[0].isa if own else ""
    return [r for r in own if r.isa == best]


def _words(row: Figures | PackRow) -> str:
    if isinstance(row, PackRow):
        return f"{row.n} x {row.k}, {row.format.name}"
    return f"{row.subject}, {row.BATCH}={row.m}, {row.format.name}"
