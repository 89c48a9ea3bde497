# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of docs/benchmarks.md from the files that measurements left.

    python benchmarks/make_page.py --bench bench.json --zentorch zentorch.json \\
        --moe bench_moe.json --end-to-end end_to_end.json docs/benchmarks.md

replaces what is between the two marks in the page; the words around them stay. With several
--bench, runs of other schemes, or --end-to-end, each has tables of its own.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import goals

from vllm_plugin_tm.bench import results, table
from vllm_plugin_tm.bench.cases import OURS, OURS_SYMMETRIC
from vllm_plugin_tm.bench.figures import Figures
from vllm_plugin_tm.bench.results import Report
from vllm_plugin_tm.bench.schemes import SCHEMES

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def main() -> int:
    """Exit status 0 when the page was written, 2 when a file is not what it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--bench", type=Path, required=True, action="append", metavar="FILE")
    parser.add_argument("--zentorch", type=Path, metavar="FILE")
    parser.add_argument("--moe", type=Path, metavar="FILE")
    parser.add_argument("--end-to-end", type=Path, action="append", default=[], metavar="FILE")
    args = parser.parse_args()
    try:
        kernels = [results.from_json(path.read_text()) for path in args.bench]
        zentorch = results.from_json(args.zentorch.read_text()) if args.zentorch else None
        engines = [json.loads(path.read_text()) for path in args.end_to_end]
        experts = results.from_json(args.moe.read_text()) if args.moe else None
        tables = render(kernels, zentorch, engines, experts)
        args.page.write_text(replaced(args.page.read_text(), tables))
    except (OSError, ValueError) as error:
        print(f"make_page.py: {error}", file=sys.stderr)
        return 2
    return 0


def replaced(page: str, tables: str) -> str:
    """The page with what is between the marks replaced.

    Raises:
        ValueError: the page lacks a mark.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page lacks the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{tables}\n{END}{after}"


def render(
    kernels: Sequence[Report],
    zentorch: Report | None,
    engines: Sequence[dict[str, Any]],
    experts: Report | None = None,
) -> str:
    """All tables in Markdown."""
    reports = [*kernels, *([zentorch] if zentorch else [])]
    outcomes = goals.of_kernels(reports)
    outcomes += goals.of_experts(experts) if experts else []
    for run in engines:
        outcomes += goals.of_engines(run["plugin_over"])
    parts = ["### Goals", _goals(outcomes)]
    for report in kernels:
        measured = dict.fromkeys(SCHEMES[row.scheme].title for row in report.rows)
        parts += [f"### Kernels: {', '.join(measured)}", _conditions(report), *_cases(report.rows)]
        if report.packing:
            parts += ["### Packing at load", _packing(report)]
        parts += _skipped(report)
    if experts:
        parts += ["### Routed experts", _conditions(experts), *_cases(experts.moe)]
        parts += _skipped(experts)
    if zentorch:
        parts += ["### Beside zentorch", _conditions(zentorch), *_cases(zentorch.rows)]
    if engines:
        parts += ["### Whole engines", *map(_engines, engines)]
    return "\n\n".join(parts) + "\n"


def _goals(outcomes: list[goals.Outcome]) -> str:
    titles = ["scheme", "goal", "must", "aim", "median", "worst", "cases that reach it"]
    rows = []
    for outcome in outcomes:
        goal, (worst, where) = outcome.goal, outcome.worst
        reached = f"{outcome.reached} of {len(outcome.figures)}"
        figures = [goal.written(v) for v in (goal.must, goal.aim, outcome.median, worst)]
        rows.append([SCHEMES[goal.scheme].title, goal.name, *figures, reached, where])
    return _table([*titles, "worst case"], rows)


def _conditions(report: Report) -> str:
    return "\n".join(f"- {line}" for line in table.conditions(report))


def _skipped(report: Report) -> list[str]:
    if not report.skipped:
        return []
    return ["Not measured:", "\n".join(f"- {reason}" for reason in report.skipped)]


def _cases(rows: Sequence[Figures]) -> list[str]:
    """A table per scheme and format, a line per matrix or layer and M: our figures, the peers'
    times beside them."""
    parts = []
    ordered = [row for row in rows if row.kernel != OURS_SYMMETRIC]
    places = {name: place for place, name in enumerate(SCHEMES)}
    ordered.sort(  # stable
        key=lambda row: (places[row.scheme], row.dtype, not row.symmetric, row.group_size)
    )
    for scheme, of_scheme in groupby(ordered, key=lambda row: row.scheme):
        parts.append(f"#### {SCHEMES[scheme].title}")
        for form, same in groupby(of_scheme, key=lambda row: row.format):
            parts += [f"**{form.name}**", _format_table(list(same))]
    return parts


def _format_table(rows: list[Figures]) -> str:
    others = list(dict.fromkeys(row.kernel for row in rows if row.kernel != OURS))
    isas = list(dict.fromkeys(row.isa for row in rows if row.kernel == OURS))
    compared = list(dict.fromkeys(name for r in rows for name in r.speedups if r.kernel == OURS))
    batch = table.batch_columns(rows[0])
    titles = [rows[0].SUBJECT, *(column.title for column in batch)]
    titles += [*(["isa"] if len(isas) > 1 else []), "ms", "p10-p90", "GB/s", "of read"]
    titles += [
        table.flops_unit(rows[0]),
        "of dot",
        *(["of loads"] if table.has_loads(rows) else []),
        "of roofline",
        *(f"{name} ms" for name in others),
    ]
    titles += [f"x {name.removeprefix(f'{OURS}-')}" for name in compared]
    times = {(row.subject, row.m, row.kernel): row.ms for row in rows}
    lines = []
    for row in (row for row in rows if row.kernel == OURS):
        own = [
            row.subject,
            *(column.cell(row) for column in batch),
            *([row.isa] if len(isas) > 1 else []),
            table.milliseconds(row.ms),
            f"{table.milliseconds(row.ms_p10)}-{table.milliseconds(row.ms_p90)}",
            f"{row.gbps:.1f}",
            table.percent(row.bandwidth_fraction),
            f"{row.gflops:.0f}",
            table.percent(row.dot_fraction),
            *([table.LOADS.cell(row)] if table.has_loads(rows) else []),
            table.percent(row.roofline_fraction),
        ]
        found = [times.get((row.subject, row.m, name)) for name in others]
        own += ["" if ms is None else table.milliseconds(ms) for ms in found]
        lines.append(own + [table.times(row.speedups.get(name)) for name in compared])
    return _table(titles, lines)


def _packing(report: Report) -> str:
    return _table(list(table.PACK_TITLES), [list(table.pack_cells(p)) for p in report.packing])


def _engines(report: dict[str, Any]) -> str:
    here = results.machine_from(report["machine"])
    lines = [
        f"- Model: {report['model']}; weights made up, batch 1",
        f"- Machine: {here.summary}; {', '.join(here.flags)}",
        f"- Versions: {', '.join(f'{name} {value}' for name, value in here.versions.items())}",
        f"- Date: {report['date']}. Command: {report['command']}",
    ]
    tokens = report["tokens"]
    titles = ["engine", f"decode tok/s ({tokens['decode']} tokens)", "min-max"]
    titles += [f"prefill tok/s ({tokens['prefill']} tokens)", "min-max"]
    rows = []
    for name, medians in report["medians"].items():
        cells = [name]
        for kind in ("decode", "prefill"):
            rates = report["rates"][name][kind]
            cells += [f"{medians[kind]:.1f}", f"{min(rates):.1f}-{max(rates):.1f}"]
        rows.append(cells)
    over = [
        [f"{own} over {name}", *(table.times(ratio[kind]) for kind in ("decode", "prefill"))]
        for own, others in report["plugin_over"].items()
        for name, ratio in others.items()
    ]
    ratios = _table(["ratio, median of paired rounds", "decode", "prefill"], over)
    return "\n\n".join(["\n".join(lines), _table(titles, rows), *([ratios] if over else [])])


def _table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
