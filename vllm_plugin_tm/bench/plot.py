# SPDX-License-Identifier: Apache-2.0
"""The roofline picture: what each kernel reaches at its intensity, under measured roofs."""

import importlib.util
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_plugin_tm.bench.cases import OURS, OURS_SYMMETRIC, TORCH, UPSTREAM
from vllm_plugin_tm.bench.results import Report, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg", ".pdf")

_MARKS = {OURS: "o", OURS_SYMMETRIC: "D", UPSTREAM: "s", TORCH: "^"}
_COLORS = ("#0b6e4f", "#c8553d", "#3d5a80", "#8e6c8a", "#e09f3e", "#5c5c5c")
_NAMES = {
    OURS: "this plugin",
    OURS_SYMMETRIC: "this plugin, symmetric twin",
    UPSTREAM: "upstream vLLM W4A16",
    TORCH: "torch F.linear",
}


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
    if not report.rows:
        raise ValueError(f"plot file {path}: the report has no rows to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.5))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.09, 0.21, 0.88, 0.71))
    _roofs(axes, report)
    _points(axes, report.rows)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("arithmetic intensity: FLOP per byte of weights, scales, x and y")
    axes.set_ylabel("GFLOP/s")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title("4-bit linear layers against the limits of the machine")
    axes.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
    axes.legend(loc="lower right", fontsize=9, framealpha=0.95)
    figure.text(0.09, 0.02, _caption(report), fontsize=7.5, family="monospace", va="bottom")
    figure.savefig(path, dpi=150)


def _roofs(axes: "Axes", report: Report) -> None:
    """The band between the limits before and after the run, for each roof."""
    intensities = [row.intensity for row in report.rows]
    left, right = min(intensities) / 1.5, max(intensities) * 1.5
    axes.set_xlim(left, right)
    reads = (report.before.read_gbps, report.after.read_gbps)
    kinds = sorted({row.limits.dot_kind for row in report.rows})
    highest = 0.0
    for kind, style in zip(kinds, ("-", "--"), strict=False):
        peaks = (report.before.dot_gflops[kind], report.after.dot_gflops[kind])
        peak = max(peaks)
        highest = max(highest, peak)
        axes.fill_between([left, right], [min(peaks)] * 2, [peak] * 2, color="#999999", alpha=0.3)
        label = f"{kind} multiply-add peak: {peak:.0f} GFLOP/s"
        axes.plot([left, right], [peak] * 2, color="black", linestyle=style, label=label)
    ends = (left, highest / max(reads))
    low, high = ([intensity * read for intensity in ends] for read in (min(reads), max(reads)))
    axes.fill_between(ends, low, high, color="#999999", alpha=0.3)
    axes.plot(ends, high, color="black", linewidth=2, label=f"read roof: {max(reads):.1f} GB/s")
    axes.set_ylim(min(row.gflops for row in report.rows) / 2, highest * 1.5)


def _points(axes: "Axes", rows: tuple[Row, ...]) -> None:
    kernels = list(dict.fromkeys((row.kernel, row.isa) for row in rows))
    for (kernel, isa), color in zip(kernels, _COLORS, strict=False):
        own = [row for row in rows if (row.kernel, row.isa) == (kernel, isa)]
        axes.scatter(
            [row.intensity for row in own],
            [row.gflops for row in own],
            marker=_MARKS.get(kernel, "x"),
            s=26,
            color=color,
            alpha=0.75,
            linewidths=0,
            label=f"{_NAMES.get(kernel, kernel)} {isa}".strip(),
            zorder=3 if kernel == OURS else 2,
        )


def _caption(report: Report) -> str:
    lines = (
        f"{report.machine.summary}",
        f"{report.date}; {', '.join(f'{n} {v}' for n, v in report.machine.versions.items())}",
        f"$ {report.command}",
        "Points: medians per matrix, format and M; grey bands: limits measured before and after.",
    )
    wrapped = (textwrap.wrap(line, 118, subsequent_indent="  ") for line in lines)
    return "\n".join(line for parts in wrapped for line in parts).replace("$", r"\$")
