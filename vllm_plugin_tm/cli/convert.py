# SPDX-License-Identifier: Apache-2.0
"""`vllm-tm convert`: options, progress and report; the work is in quantization/convert."""

import argparse
import contextlib
import json
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich import progress as bars
from rich.console import Console

from vllm_plugin_tm import heap
from vllm_plugin_tm.quantization.convert import ConvertError, Options
from vllm_plugin_tm.quantization.convert import options as known

if TYPE_CHECKING:
    from vllm_plugin_tm.quantization.convert import Report, Watch

_SHOWN = 3  # names of modules after each reason
_KEPT_BYTES = 256 << 20
_INTERRUPTED = 130  # as shells give it for SIGINT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `vllm-tm convert`."""
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="a checkpoint's folder: safetensors, config.json")
    add("destination", type=Path, metavar="DST", help="the folder to make")
    add("--scheme", required=True, choices=known.SCHEMES, help="what weights become")
    add(
        "--group-size",
        type=_checked(known.parse_group_size),
        metavar="N",
        help="weights that share a scale: 32 (default), 64, 128, any multiple of 8, or channel",
    )
    add(
        "--block-size",
        type=int,
        choices=known.BLOCK_SIZES,
        help=f"rows and columns of a block of fp8-block (default: {known.BLOCK})",
    )
    add(
        "--scales",
        default="float",
        choices=known.SCALES,
        help="of FP8 weights: any number (default), or powers of two, rounded up",
    )
    add(
        "--symmetric",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="without zero points (default) or with",
    )
    add(
        "--method",
        default="rtn",
        choices=known.METHODS,
        help="; ".join(f"{name}: {text}" for name, text in known.METHODS.items()),
    )
    add(
        "--mse-weight",
        default="none",
        choices=known.MSE_WEIGHTS,
        help="what --method mse weighs a squared error with (default: none)",
    )
    add("--format", help="of compressed-tensors, where a scheme has several")
    pattern = "names of modules, or regular expressions after re:"
    add("--ignore", nargs="+", action="extend", default=[], metavar="PATTERN", help=pattern)
    add(
        "--targets",
        nargs="+",
        action="extend",
        metavar="PATTERN",
        help=f"{pattern} (default: projections of attention, MLPs and experts)",
    )
    add("--lm-head", action="store_true", help="the output head too")
    add("--mtp", action="store_true", help="multi-token prediction heads too")
    add(
        "--on-indivisible",
        default="error",
        choices=known.ON_INDIVISIBLE,
        help="where the group size does not divide an input size, or the block size either size: "
        "stop (default), one scale per output channel there, or leave the layer",
    )
    add("--workers", type=int, metavar="N", help="threads (default: one per processor)")
    add(
        "--max-memory",
        type=_checked(known.parse_bytes),
        metavar="SIZE",
        help="bound of resident memory, as 2GiB (default: a quarter of the machine's)",
    )
    add(
        "--shard-size",
        type=_checked(known.parse_bytes),
        default=known.DEFAULT_SHARD_BYTES,
        metavar="SIZE",
        help="of an output file at most (default: 5G)",
    )
    add("--calibration", metavar="FILE", help="a text, for --method gptq")
    add("--calibration-samples", type=int, default=128, metavar="N", help="default: %(default)s")
    add(
        "--calibration-length", type=int, default=512, metavar="TOKENS", help="default: %(default)s"
    )
    add("--calibration-python", metavar="FILE", help="the interpreter that has llm-compressor")
    add("--resume", action="store_true", help="go on with an unfinished conversion")
    add("--dry-run", action="store_true", help="say what would be done")
    add("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Converts: 0 when done, 1 when it cannot be, 130 when interrupted."""
    console = Console(stderr=True, soft_wrap=True)
    say = _plain(console)
    try:
        options = _options(args)
        from vllm_plugin_tm.quantization.convert import convert, preview

        # The pages' faults took a quarter of the time: 270 -> 355 M weights/s on two cores.
        heap.keep(_KEPT_BYTES)
        if args.dry_run:
            report = preview(args.source, args.destination, options)
        else:
            with _watched(console) as watch:
                report = convert(args.source, args.destination, options, watch)
    except ConvertError as error:
        say(f"vllm-tm convert: {error}")
        return 1
    except KeyboardInterrupt:
        say(
            "vllm-tm convert: stopped; the same command with --resume goes on in "
            f"{args.destination}"
        )
        return _INTERRUPTED
    if args.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        print(text(report, dry=args.dry_run))
    return 0


def text(report: "Report", *, dry: bool) -> str:
    """The report for people."""
    group = "channel" if report.group_size < 0 else f"group {report.group_size}"
    zeros = "symmetric" if report.symmetric else "asymmetric"
    verb = "would become" if dry else "became"
    lines = [
        f"{report.layers} matrices, {report.parameters / 1e6:,.1f} M weights, {verb} "
        f"{report.scheme} ({group}, {zeros}, {report.method}; {report.format})",
        f"{report.bytes_read / 1e9:,.3f} GB read, {report.bytes_written / 1e9:,.3f} GB written "
        f"in {len(report.files)} file{'s' if len(report.files) > 1 else ''}",
    ]
    if not dry:
        rate = report.parameters / max(report.seconds, 1e-9) / 1e6
        lines.append(
            f"{report.seconds:.1f} s, {rate:,.0f} M weights/s, "
            f"{report.peak_bytes / 1e6:,.0f} MB resident at most"
        )
    if report.indivisible:
        lines.append(f"one scale per output channel instead: {_some(list(report.indivisible))}")
    reasons: dict[str, list[str]] = {}
    for name, reason in report.kept.items():
        reasons.setdefault(reason, []).append(name)
    if reasons:
        lines.append("left as they are:")
        lines += [
            f"  {len(names):5}  {reason}: {_some(names)}" for reason, names in reasons.items()
        ]
    if not dry:
        lines.append(f"in {report.destination}")
    return "\n".join(lines)


def _options(args: argparse.Namespace) -> Options:
    return Options(
        scheme=args.scheme,
        group_size=args.group_size,
        block_size=args.block_size,
        symmetric=args.symmetric,
        method=args.method,
        format=args.format,
        ignore=tuple(args.ignore),
        targets=None if args.targets is None else tuple(args.targets),
        lm_head=args.lm_head,
        mtp=args.mtp,
        on_indivisible=args.on_indivisible,
        mse_weight=args.mse_weight,
        scales=args.scales,
        workers=args.workers,
        max_memory=args.max_memory,
        shard_bytes=args.shard_size,
        resume=args.resume,
        calibration=args.calibration,
        calibration_samples=args.calibration_samples,
        calibration_length=args.calibration_length,
        calibration_python=args.calibration_python,
    )


@contextlib.contextmanager
def _watched(console: Console) -> Iterator["Watch"]:
    """Progress on a terminal, silence elsewhere; SIGTERM stops as Ctrl-C does."""
    from vllm_plugin_tm.quantization.convert import Watch

    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    columns = (
        bars.TextColumn("converting"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    shown = console.is_terminal
    try:
        with bars.Progress(*columns, console=console, disable=not shown, transient=True) as bar:
            task = bar.add_task("", total=None)
            yield Watch(
                total=lambda size: bar.update(task, total=size),
                advance=lambda size: bar.advance(task, size),
                stop=stop,
            )
    finally:
        signal.signal(signal.SIGTERM, before)


def _checked(parse: Callable[[str], int]) -> Callable[[str], int]:
    """As argparse wants its types: errors become its own."""

    def parsed(value: str) -> int:
        try:
            return parse(value)
        except ConvertError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def _plain(console: Console) -> Callable[[str], None]:
    return lambda message: console.print(message, highlight=False, markup=False)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
