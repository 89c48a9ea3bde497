# SPDX-License-Identifier: Apache-2.0
"""A report as tables for the terminal."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table

from vllm_plugin_tm.bench.cases import OURS, OURS_SYMMETRIC, Format
from vllm_plugin_tm.bench.figures import Figures, MoeRow
from vllm_plugin_tm.bench.limits import Limits, drift
from vllm_plugin_tm.bench.results import PackRow, Report


@dataclass(frozen=True)
class Column:
    """A heading and how a row fills it."""

    title: str
    cell: Callable[[Figures], str]


def percent(fraction: float) -> str:
    """0.934 -> "93 %"."""
    return f"{fraction * 100:.0f} %"


def _percent_or_none(fraction: float | None) -> str:
    return "" if fraction is None else percent(fraction)


def times(factor: float | None) -> str:
    """5.127 -> "5.13x", "" for None."""
    return "" if factor is None else f"{factor:.2f}x"


def milliseconds(value: float) -> str:
    """Three significant digits without an exponent."""
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}"


FLOPS = "GFLOP/s"

COLUMNS = (
    Column("kernel", lambda row: f"{row.kernel} {row.isa}".strip()),
    Column("ms", lambda row: milliseconds(row.ms)),
    Column("p10-p90", lambda row: f"{milliseconds(row.ms_p10)}-{milliseconds(row.ms_p90)}"),
    Column("GB/s", lambda row: f"{row.gbps:.1f}"),
    Column("%read", lambda row: percent(row.bandwidth_fraction)),
    Column(FLOPS, lambda row: f"{row.gflops:.0f}"),
    Column("%dot", lambda row: percent(row.dot_fraction)),
    Column("%roof", lambda row: percent(row.roofline_fraction)),
)
LOADS = Column("%loads", lambda row: _percent_or_none(row.loads_fraction))
"""After "%dot", where that is measured."""
_QUIET = 0.1
"""Largest change of a limit over a run whose figures can be quoted."""

_LOAD = 0.5
"""Likewise of the load average over the number of processors: one busy processor out of two."""

PACK_TITLES = ("N x K", "format", "ms", "p10-p90", "GB/s of codes", "resident / disk bytes")


def sections(rows: Iterable[Figures]) -> list[tuple[str, list[Figures]]]:
    """Rows by matrix or layer and format, in their order, each with its heading. The symmetric twin
    of an asymmetric case stays with that case."""

    def key(row: Figures) -> tuple[str, Format]:
        twin = row.kernel == OURS_SYMMETRIC
        return row.heading, replace(row.format, symmetric=row.symmetric and not twin)

    return [(f"{what}, {form.name}", list(same)) for (what, form), same in groupby(rows, key)]


def pack_cells(row: PackRow) -> tuple[str, ...]:
    """One packing row under PACK_TITLES."""
    return (
        f"{row.n} x {row.k}",
        row.format.name,
        milliseconds(row.ms),
        f"{milliseconds(row.ms_p10)}-{milliseconds(row.ms_p90)}",
        f"{row.gbps:.2f}",
        f"{row.resident_ratio:.3f}",
    )


def columns_for(rows: list[Figures]) -> tuple[Column, ...]:
    """The batch, COLUMNS, and one for each peer that any of the rows, of one format, is compared
    with."""
    names = dict.fromkeys(name for row in rows for name in row.speedups if name != OURS)
    unit = flops_unit(rows[0])
    own = [replace(column, title=unit) if column.title == FLOPS else column for column in COLUMNS]
    if has_loads(rows):
        own.insert(len(own) - 1, LOADS)
    return (*batch_columns(rows[0]), *own, *(_speedup_column(name) for name in names))


def has_loads(rows: list[Figures]) -> bool:
    """Whether the rows' limits include products with their loads."""
    return any(row.loads_fraction is not None for row in rows)


def batch_columns(row: Figures) -> tuple[Column, ...]:
    """Rows of activations; of routed experts also how many of them these touch."""
    batch = Column(row.BATCH, lambda row: str(row.m))
    return (batch, Column("experts", _touched)) if isinstance(row, MoeRow) else (batch,)


def _touched(row: Figures) -> str:
    return f"{row.touched:.1f}" if isinstance(row, MoeRow) else ""


def flops_unit(row: Figures) -> str:
    """What operations per second are called: integers are no floating-point numbers."""
    return "GOP/s" if row.format.facts.integer_activations else FLOPS


def _speedup_column(name: str) -> Column:
    if name != OURS_SYMMETRIC:
        return Column(f"x {name}", lambda row: times(row.speedups.get(name)))

    def cell(row: Figures) -> str:  # of interest for the same kernel only
        return times(row.speedups.get(name)) if row.kernel == OURS else ""

    return Column("x symmetric", cell)


def conditions(report: Report) -> list[str]:
    """Under which conditions, line by line: what every claim has to carry."""
    here = report.machine
    lines = [
        f"Machine: {here.summary}; {', '.join(here.flags)}",
        f"Versions: {', '.join(f'{name} {value}' for name, value in here.versions.items())}",
        f"Date: {report.date}. Command: {report.command}",
        f"Limits before: {_limits(report.before)}",
        f"Limits after:  {_limits(report.after)}",
    ]
    moved = drift(report.before, report.after)
    lines.append("Drift: " + ", ".join(f"{name} {by * 100:+.1f} %" for name, by in moved.items()))
    reasons = []
    if max(map(abs, moved.values())) > _QUIET:
        reasons.append(f"the limits moved by more than {_QUIET * 100:.0f} % during the run")
    if here.load > _LOAD * here.cpus:
        reasons.append(f"the load average before the run was {here.load} on {here.cpus} CPUs")
    if reasons:
        lines.append(f"WARNING: {' and '.join(reasons)}: the figures are not to be quoted")
    return lines


def _limits(limits: Limits) -> str:
    dots = ", ".join(f"{k} {v:.0f}" for k, v in limits.dot_gflops.items() if v)
    return (
        f"read {limits.read_gbps:.1f} GB/s ({limits.read_small_pages_gbps:.1f} from small pages); "
        f"multiply-adds in GFLOP/s (of int8: GOP/s): {dots}"
    )


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", pad_edge=False, box=box.SIMPLE_HEAD)


def width(tables: list[Table]) -> int:
    """Columns of text that the widest table needs."""
    wide = Console(width=1000)
    return max((wide.measure(table).maximum for table in tables), default=0)


def rich_tables(report: Report) -> list[Table]:
    """One table per matrix or layer and format, and one for packing."""
    tables = []
    for title, rows in sections(report.figures):
        columns = columns_for(rows)
        table = _table(title)
        for column in columns:
            left = column.title == "kernel"
            table.add_column(column.title, justify="left" if left else "right", no_wrap=True)
        for row in rows:
            style = "bold" if row.kernel == OURS else None
            table.add_row(*(column.cell(row) for column in columns), style=style)
        tables.append(table)
    if report.packing:
        table = _table("packing at load")
        for title in PACK_TITLES:
            table.add_column(title, justify="right", no_wrap=True)
        for pack in report.packing:
            table.add_row(*pack_cells(pack))
        tables.append(table)
    return tables
