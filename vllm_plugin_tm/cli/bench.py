# SPDX-License-Identifier: Apache-2.0
"""`vllm-tm bench`: options, progress and tables; measuring is in vllm_plugin_tm/bench."""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich import progress as bars
from rich.console import Console

from vllm_plugin_tm.bench import amx, cases, machine, moe_cases, options, plot, schemes
from vllm_plugin_tm.bench import timing as effort
from vllm_plugin_tm.kernels import ops

if TYPE_CHECKING:
    from vllm_plugin_tm.bench.results import Report
    from vllm_plugin_tm.bench.rounds import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `vllm-tm bench`."""
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--shapes",
        type=options.shapes,
        metavar="NxK,...",
        help="output x input sizes of linear layers",
    )
    what.add_argument(
        "--moe",
        type=options.layers,
        nargs="?",
        const=(),
        metavar="LAYER,...",
        help=f"layers of routed experts instead, of {', '.join(moe_cases.LAYERS)} (default: all) "
        "or EXPERTSxHIDDENxINTERMEDIATExTOP_K",
    )
    add(
        "--scheme",
        type=options.schemes,
        metavar="NAME,...",
        help=f"of {', '.join(schemes.SCHEMES)}; {' and '.join(schemes.FAMILIES)} for all of a "
        "kind, or all (default in a run without shapes, batch and group sizes: "
        f"{', '.join(schemes.DEFAULT_SCHEMES)}, of routed experts "
        f"{', '.join(moe_cases.MOE_SCHEMES)}; {schemes.USUAL_SCHEME} in any other)",
    )
    add(
        "--m",
        type=options.batches,
        metavar="M,...",
        help="rows of activations, tokens of routed experts",
    )
    add(
        "--group-size",
        type=options.group_sizes,
        metavar="G,...",
        help="group sizes, `channel` for one scale per output channel",
    )
    symmetry = parser.add_mutually_exclusive_group()
    symmetry.add_argument(
        "--asymmetric",
        action="store_true",
        help="with zero points: of the weights, of the activations for w8a8",
    )
    symmetry.add_argument("--both", action="store_true", help="symmetric, then with zero points")
    add("--dtype", type=options.dtypes, metavar="D,...", help="activations: bf16, f16, f32")
    add(
        "--kernels",
        type=options.kernels,
        default=cases.KERNELS,
        metavar="NAME,...",
        help="whom to measure (default: %(default)s)",
    )
    add("--isa", metavar="NAME,...", help="instruction sets of our kernel, or all (default: best)")
    add(
        "--no-amx",
        action="store_true",
        help="our kernels and all peers as on a processor without AMX",
    )
    add("--threads", type=options.threads, help="default: every processor of this process")
    add(
        "--quick",
        action="store_true",
        help="three shapes, four batch sizes: under a minute for a scheme; one layer of experts",
    )
    add("--json", type=options.output_file, metavar="FILE", help="write all figures")
    add("--plot", type=options.plot_file, metavar="FILE", help="write a roofline picture")


def run(args: argparse.Namespace, more: tuple[Callable, ...] = ()) -> int:
    """Measures and prints: 0 when done, 1 when our kernel computes a wrong result, 2 when the
    request cannot be carried out here. `more` are further peers of linear layers:
    runner.Plan.more."""
    errors = Console(stderr=True, soft_wrap=True)
    try:
        if args.plot:
            plot.require()
        if args.no_amx:
            amx.hide()
        ops.load()
        measure = _planned(args, more)
    except (ValueError, ops.ExtensionMissingError, plot.PlotUnavailableError) as error:
        errors.print(f"vllm-tm bench: {error}", highlight=False, markup=False)
        return 2
    from vllm_plugin_tm.bench import guard, results, table

    try:
        with _progress(errors) as progress:
            report = measure(progress)
    except guard.WrongResultError as error:
        errors.print(f"vllm-tm bench: {error}", highlight=False, markup=False)
        return 1
    # Files first: a closed pipe at the tables must not lose the figures.
    if args.json:
        args.json.write_text(results.to_json(report))
    if args.plot:
        plot.save(report, args.plot)
    tables = table.rich_tables(report)
    # Where a table is wider than the terminal, that wraps its lines; rich would cut off figures.
    out = Console(width=max(Console().width, table.width(tables)))
    say = partial(out.print, highlight=False, markup=False, soft_wrap=True)
    for drawn in tables:
        out.print(drawn)
        say("")
    for line in table.conditions(report):
        say(line)
    for reason in report.skipped:
        say(f"Not measured: {reason}")
    for written in filter(None, (args.json, args.plot)):
        say(f"Written: {written}")
    return 0


def _planned(
    args: argparse.Namespace, more: tuple[Callable, ...]
) -> Callable[["Progress"], "Report"]:
    """The run that was asked for.

    Raises:
        ValueError: nothing here can carry it out.
    """
    from vllm_plugin_tm.bench import moe_runner, runner

    how = {
        "kernels": args.kernels,
        "isas": _isas(args.isa, args.no_amx),
        "threads": args.threads or len(machine.usable_cpus()),
        "effort": effort.QUICK if args.quick else effort.FULL,
        "command": _command(),
    }
    if args.moe is None:
        plan = runner.Plan(cases=tuple(_cases(args)), more=more, **how)
        return partial(runner.run, plan)
    if more:
        raise ValueError("--moe: the other engine is measured on linear layers only")
    if not set(args.kernels) & set(moe_runner.KERNELS):
        raise ValueError(
            f"--kernels: of routed experts there are {', '.join(moe_runner.KERNELS)}, "
            f"given {', '.join(args.kernels)}"
        )
    moe_plan = moe_runner.Plan(cases=tuple(_moe_cases(args)), **how)
    return partial(moe_runner.run, moe_plan)


def _command() -> str:
    """The command line as a user would type it."""
    script = Path(sys.argv[0]).name
    return shlex.join(["vllm-tm" if script == "__main__.py" else script, *sys.argv[1:]])


def _isas(text: str | None, no_amx: bool) -> tuple[str, ...]:
    available = tuple(isa for isa in ops.cpu_isas() if not (no_amx and isa == "amx"))
    if not available:
        raise ValueError("this processor has none of the instruction sets that kernels exist for")
    if text:
        return options.isas(text, available)
    return (amx.isa() if no_amx else ops.get_isa(),)


def _cases(args: argparse.Namespace) -> list[cases.Case]:
    chosen, dtypes = _schemes(args, schemes.DEFAULT_SCHEMES), args.dtype or ("bf16",)
    if _asked(args) or args.quick:
        return cases.chosen_cases(
            chosen, args.shapes, args.m, args.group_size, _symmetries(args), dtypes, args.quick
        )
    return [case for dtype in dtypes for case in cases.default_cases(chosen, dtype)]


def _moe_cases(args: argparse.Namespace) -> list[moe_cases.MoeCase]:
    chosen, dtypes = _schemes(args, moe_cases.MOE_SCHEMES), args.dtype or ("bf16",)
    return moe_cases.chosen_cases(
        chosen, args.moe, args.m, args.group_size, _symmetries(args), dtypes, args.quick
    )


def _asked(args: argparse.Namespace) -> bool:
    """Whether matrices and formats are those that were asked for, not those of a default run."""
    return any((args.shapes, args.m, args.group_size, args.asymmetric, args.both))


def _schemes(args: argparse.Namespace, every: tuple[str, ...]) -> tuple[str, ...]:
    return args.scheme or ((schemes.USUAL_SCHEME,) if _asked(args) or args.quick else every)


def _symmetries(args: argparse.Namespace) -> tuple[bool, ...]:
    return (True, False) if args.both else (not args.asymmetric,)


@contextmanager
def _progress(console: Console) -> Iterator["Progress"]:
    """A bar on a terminal; elsewhere a line per matrix or layer, so that a log stays short."""
    if not console.is_terminal:
        seen: set[str] = set()

        def line(done: int, total: int, label: str) -> None:
            matrix = re.split(", [MT]=", label)[0]
            if matrix not in seen:
                seen.add(matrix)
                console.print(f"[{done}/{total}] {matrix}", highlight=False, markup=False)

        yield line
        return
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
    )
    with bars.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("limits", total=None)

        def update(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, description=label)

        yield update
