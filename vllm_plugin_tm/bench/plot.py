# SPDX-License-Identifier: Apache-2.0
"""The roofline picture: what each kernel reaches at its intensity, under measured roofs; a panel
per scheme, routed experts apart from linear layers."""

import importlib.util
import itertools
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_plugin_tm.bench.cases import (
    OURS,
    OURS_SYMMETRIC,
    TORCH,
    UPSTREAM,
    UPSTREAM_BF16,
    UPSTREAM_W8A8,
)
from vllm_plugin_tm.bench.figures import Figures
from vllm_plugin_tm.bench.results import Report
from vllm_plugin_tm.bench.table import flops_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg", ".pdf")

_MARKS = {
    OURS: "o",
    OURS_SYMMETRIC: "D",
    UPSTREAM: "s",
    UPSTREAM_W8A8: "v",
    UPSTREAM_BF16: "P",
    TORCH: "^",
}
_COLORS = (
    "#0b6e4f",
    "#c8553d",
    "#3d5a80",
    "#8e6c8a",
    "#e09f3e",
    "#5c5c5c",
    "#7fb069",
    "#2a9d8f",
)
_NAMES = {
    OURS: "this plugin",
    OURS_SYMMETRIC: "this plugin, symmetric twin",
    UPSTREAM: "upstream vLLM {scheme}",
    UPSTREAM_W8A8: "upstream vLLM W8A8",
    UPSTREAM_BF16: "upstream vLLM bf16",
    TORCH: "torch F.linear",
}
_PANEL = (10.0, 5.9)  # inches
_CAPTION = 1.0


class PlotUnavailableError(RuntimeError):
    """No picture can be drawn; the message says why and the cure."""


def require() -> None:
    """Checks that a picture can be drawn, without drawing one.

    Raises:
        PlotUnavailableError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotUnavailableError("--plot needs matplotlib: pip install 'vllm-plugin-tm[bench]'")


def save(report: Report, path: Path) -> None:
    """Draws the report's rows into `path`, a file name ending in one of SUFFIXES.

    Raises:
        PlotUnavailableError: matplotlib is missing.
        ValueError: no rows to draw, or another suffix.
    """
    require()
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"plot file {path}: expected a name ending in one of {', '.join(SUFFIXES)}"
        )
    if not report.figures:
        raise ValueError(f"plot file {path}: the report has no rows to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        [row for row in report.figures if (row.LAYERS, row.scheme) == panel]
        for panel in dict.fromkeys((row.LAYERS, row.scheme) for row in report.figures)
    ]
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    width, height = _PANEL[0] * columns, _PANEL[1] * lines + _CAPTION
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    for place, rows in enumerate(panels):
        line, column = divmod(place, columns)
        top = height - line * _PANEL[1]
        corner = ((column + 0.1) * _PANEL[0] / width, (top - 0.9 * _PANEL[1]) / height)
        size = (0.87 * _PANEL[0] / width, 0.82 * _PANEL[1] / height)
        _panel(figure.add_axes((*corner, *size)), report, rows)
    style: dict[str, Any] = {"fontsize": 7.5, "family": "monospace", "va": "bottom"}
    figure.text(0.1 / columns, 0.02, _caption(report), **style)
    figure.savefig(path, dpi=150 if columns == 1 else 100)


def _panel(axes: "Axes", report: Report, rows: list[Figures]) -> None:
    """One scheme: its points under the roofs that bound it."""
    _roofs(axes, report, rows)
    _points(axes, report, rows)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    unit = flops_unit(rows[0])
    operations = unit.removesuffix("/s").removeprefix("G")
    axes.set_xlabel(f"arithmetic intensity: {operations} per byte of weights, scales, x and y")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title(
        f"{rows[0].format.facts.title} {rows[0].LAYERS} against the limits of the machine"
    )
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
    axes.legend(loc="lower right", fontsize=9, framealpha=0.95)


def _roofs(axes: "Axes", report: Report, rows: list[Figures]) -> None:
    """The band between the limits before and after the run, for each roof of these rows."""
    intensities = [row.intensity for row in rows]
    left, right = min(intensities) / 1.5, max(intensities) * 1.5
    axes.set_xlim(left, right)
    reads = (report.before.read_gbps, report.after.read_gbps)
    kinds = sorted({row.limits.dot_kind for row in rows})
    unit = flops_unit(rows[0])
    highest = 0.0
    for kind, style in zip(kinds, itertools.cycle(("-", "--", "-.", ":"))):
        peaks = (report.before.dot_gflops[kind], report.after.dot_gflops[kind])
        peak = max(peaks)
        highest = max(highest, peak)
        axes.fill_between([left, right], [min(peaks)] * 2, [peak] * 2, color="#999999", alpha=0.3)
        label = f"{kind} multiply-add peak: {peak:.0f} {unit}"
        axes.plot([left, right], [peak] * 2, color="black", linestyle=style, label=label)
    ends = (left, highest / max(reads))
    low, high = ([intensity * read for intensity in ends] for read in (min(reads), max(reads)))
    axes.fill_between(ends, low, high, color="#999999", alpha=0.3)
    axes.plot(ends, high, color="black", linewidth=2, label=f"read roof: {max(reads):.1f} GB/s")
    axes.set_ylim(min(row.gflops for row in rows) / 2, highest * 1.5)


def _points(axes: "Axes", report: Report, rows: list[Figures]) -> None:
    scheme = rows[0].format.facts.title
    # A kernel has one colour in all panels.
    kernels = dict.fromkeys((row.kernel, row.isa) for row in report.figures)
    for (kernel, isa), color in zip(kernels, itertools.cycle(_COLORS), strict=False):
        own = [row for row in rows if (row.kernel, row.isa) == (kernel, isa)]
        if not own:
            continue
        axes.scatter(
            [row.intensity for row in own],
            [row.gflops for row in own],
            marker=_MARKS.get(kernel, "x"),
            s=26,
            color=color,
            alpha=0.75,
            linewidths=0,
            label=f"{_NAMES.get(kernel, kernel).format(scheme=scheme)} {isa}".strip(),
            zorder=3 if kernel == OURS else 2,
        )


def _caption(report: Report) -> str:
    lines = (
        f"{report.machine.summary}",
        f"{report.date}; {', '.join(f'{n} {v}' for n, v in report.machine.versions.items())}",
        f"$ {report.command}",
        "Points: medians per layer, format and batch; grey bands: limits before and after.",
    )
    wrapped = (textwrap.wrap(line, 118, subsequent_indent="  ") for line in lines)
    return "\n".join(line for parts in wrapped for line in parts).replace("$", r"\$")
