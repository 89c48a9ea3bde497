# SPDX-License-Identifier: Apache-2.0
"""`vllm-tm bench`: options, progress and tables; measuring is in vllm_plugin_tm/bench."""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_plugin_tm.bench import cases, machine, options, plot, schemes
from vllm_plugin_tm.bench import timing as effort
from vllm_plugin_tm.kernels import ops


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `vllm-tm bench`."""
    add = parser.add_argument
    add("--shapes", type=options.shapes, metavar="NxK,...", help="output x input sizes")
    add(
        "--scheme",
        type=options.schemes,
        metavar="NAME,...",
        help=f"of {', '.join(schemes.SCHEMES)}, or all (default: all in a run without shapes, "
        f"batch and group sizes, {schemes.USUAL_SCHEME} in any other)",
    )
    add("--m", type=options.batches, metavar="M,...", help="rows of activations")
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
    add("--threads", type=options.threads, help="default: every processor of this process")
    add(
        "--quick",
        action="store_true",
        help="three shapes, four batch sizes: under a minute for a scheme",
    )
    add("--json", type=options.output_file, metavar="FILE", help="write all figures")
    add("--plot", type=options.plot_file, metavar="FILE", help="write a roofline picture")


def run(args: argparse.Namespace, more: tuple[Callable, ...] = ()) -> int:
    """Measures and prints: 0 when done, 1 when our kernel computes a wrong result, 2 when the
    request cannot be carried out here. `more` are further peers: runner.Plan.more."""
    errors = Console(stderr=True, soft_wrap=True)
    try:
        if args.plot:
            plot.require()
        ops.load()
        isas = _isas(args.isa)
        chosen = _cases(args)
    except (ValueError, ops.ExtensionMissingError, plot.PlotUnavailableError) as error:
        errors.print(f"vllm-tm bench: {error}", highlight=False, markup=False)
        return 2
    from vllm_plugin_tm.bench import guard, results, runner, table

    plan = runner.Plan(
        cases=tuple(chosen),
        kernels=args.kernels,
        isas=isas,
        threads=args.threads or len(machine.usable_cpus()),
        effort=effort.QUICK if args.quick else effort.FULL,
        command=_command(),
        more=more,
    )
    try:
        with _progress(errors) as progress:
            report = runner.run(plan, progress)
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


def _command() -> str:
    """The command line as a user would type it."""
    script = Path(sys.argv[0]).name
    return shlex.join(["vllm-tm" if script == "__main__.py" else script, *sys.argv[1:]])


def _isas(text: str | None) -> tuple[str, ...]:
    available = ops.cpu_isas()
    if not available:
        raise ValueError("this processor has none of the instruction sets that kernels exist for")
    return options.isas(text, available) if text else (ops.get_isa(),)


def _cases(args: argparse.Namespace) -> list[cases.Case]:
    symmetries = (True, False) if args.both else (not args.asymmetric,)
    asked = any((args.shapes, args.m, args.group_size, args.asymmetric, args.both))
    every = tuple(schemes.SCHEMES)
    chosen = args.scheme or ((schemes.USUAL_SCHEME,) if asked or args.quick else every)
    dtypes = args.dtype or ("bf16",)
    if asked or args.quick:
        return cases.chosen_cases(
            chosen, args.shapes, args.m, args.group_size, symmetries, dtypes, args.quick
        )
    return [case for dtype in dtypes for case in cases.default_cases(chosen, dtype)]


@contextmanager
def _progress(console: Console) -> Iterator:  # yields a runner.Progress
    """A bar on a terminal; elsewhere a line per matrix, so that a log stays short."""
    if not console.is_terminal:
        seen: set[str] = set()

        def line(done: int, total: int, label: str) -> None:
            matrix = label.partition(", M=")[0]
            if matrix not in seen:
                seen.add(matrix)
                console.print(f"[{done}/{total}] {matrix}", highlight=False, markup=False)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("limits", total=None)

        def update(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, description=label)

        yield update
