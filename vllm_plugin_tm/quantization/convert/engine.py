# SPDX-License-Identifier: Apache-2.0
"""From a request to a finished folder: plan, memory, pieces, and what is reported."""

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from vllm_plugin_tm.quantization.convert.checkpoint import open_checkpoint
from vllm_plugin_tm.quantization.convert.config import output_config
from vllm_plugin_tm.quantization.convert.destination import Destination, other_files
from vllm_plugin_tm.quantization.convert.errors import ConvertError
from vllm_plugin_tm.quantization.convert.gptq_worker import resident
from vllm_plugin_tm.quantization.convert.options import Options
from vllm_plugin_tm.quantization.convert.plan import Plan, make_plan
from vllm_plugin_tm.quantization.convert.run import (
    PIECE_WEIGHTS,
    default_workers,
    memory_of_piece,
    pieces,
    write_all,
)

_FORMAT = 1  # raised when the same options give other bytes: no conversion goes on across versions
_SLACK = 128 << 20  # what allocators hold back, and libraries that load when first used
_LEAST_BOUND = 1 << 30  # beyond what the process holds, where no bound was asked for
_LEAST_PIECE = 1 << 14  # weights; below, the interpreter's part is most of the work

# Options on which the bytes of the output do not depend.
_HOW = ("workers", "max_memory", "resume", "calibration_python", "_details")


@dataclass(frozen=True)
class Report:
    """What a conversion did, or would do.

    `parameters` are the quantized weights, in `layers` modules; `kept` the modules with a matrix
    that stayed, with the reason; `indivisible` those with one scale per output channel because
    their input size is no multiple of the group size; `copied` the other files. Bytes are those of
    tensors. `seconds` (from the first byte written) and `peak_bytes` (resident, of the whole
    process) are zero in a preview.
    """

    destination: str
    scheme: str
    group_size: int
    symmetric: bool
    method: str
    format: str
    layers: int
    parameters: int
    bytes_read: int
    bytes_written: int
    files: tuple[str, ...]
    copied: tuple[str, ...]
    kept: dict[str, str]
    indivisible: tuple[str, ...]
    seconds: float = 0.0
    peak_bytes: int = 0
    resumed: bool = False


@dataclass(frozen=True)
class Watch:
    """What a caller may want to hear while a conversion runs: `total` of the bytes to read once,
    then `advance` by each piece's, from any thread. Setting `stop` ends it, to be resumed."""

    total: Callable[[int], None] = lambda _bytes: None
    advance: Callable[[int], None] = lambda _bytes: None
    stop: threading.Event | None = None


def preview(source: str | Path, destination: str | Path, options: Options) -> Report:
    """What convert() would do, without reading a weight or writing a byte.

    Raises ConvertError as convert() does for all that names and shapes tell.
    """
    return _report(_planned(Path(source), Path(destination), options), Path(destination))


def convert(
    source: str | Path, destination: str | Path, options: Options, watch: Watch | None = None
) -> Report:
    """Writes `source`, a checkpoint in the Hugging Face layout, quantized to `destination`.

    The same source and options give the same bytes, whatever the number of workers and however
    often the conversion was stopped and resumed.

    Raises:
        ConvertError: with what, where and what is allowed; nothing that looks finished is left.
        KeyboardInterrupt: what is written is noted; the same call with `resume` goes on.
    """
    watch = watch or Watch()
    stop = watch.stop or threading.Event()
    folder = Path(destination)
    plan = _planned(Path(source), folder, options)
    if options.method == "gptq":
        from vllm_plugin_tm.quantization.convert.gptq import calibrate

        return _report(plan, folder, *calibrate(plan, folder))
    config = output_config(plan)
    start = time.monotonic()
    workers = options.workers or default_workers()
    target = Destination(
        folder, _recipe(plan, _piece_weights(plan, workers)), resume=options.resume
    )
    weights = target.recipe["pieces"]
    try:
        target.create(plan.shards)
        done = target.done
        left = (p.source_bytes for p in pieces(plan, weights) if p.number not in done)
        watch.total(sum(left))
        write_all(plan, target, weights=weights, workers=workers, progress=watch.advance, stop=stop)
        if stop.is_set():
            raise KeyboardInterrupt
        target.finish(plan, config)
    except ConvertError:
        target.discard(only_if_fresh=True)
        raise
    except BaseException:
        target.leave()
        raise
    seconds = time.monotonic() - start
    return _report(plan, folder, seconds, resident("VmHWM"), target.resumed)


def _planned(source: Path, destination: Path, options: Options) -> Plan:
    inside = source.resolve()
    if inside in (destination.resolve(), *destination.resolve().parents):
        raise ConvertError(f"{destination} is SRC or inside it; name a folder elsewhere")
    return make_plan(open_checkpoint(source), options)


def _piece_weights(plan: Plan, workers: int) -> int:
    """Weights of a piece: as many as memory allows, up to what pays.

    Raises ConvertError where the bound is below what the process and a piece for each worker take.
    """
    base = resident("VmRSS") + _SLACK
    # A caller that holds more than a quarter already is not refused for want of an option.
    bound = plan.options.max_memory or max(_memory() // 4, base + _LEAST_BOUND)
    weights = PIECE_WEIGHTS
    while base + workers * memory_of_piece(plan, weights) > bound:
        if weights <= _LEAST_PIECE:
            need = base + workers * memory_of_piece(plan, weights)
            raise ConvertError(
                f"max_memory is {bound:,} bytes, but {workers} workers need {need:,}, of which "
                f"{base:,} are the interpreter and its libraries; allow more, or fewer workers"
            )
        weights //= 2
    return weights


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _recipe(plan: Plan, weights: int) -> dict:
    """All that the output's bytes depend on, and "pieces", which says how the work is cut."""
    options = {k: v for k, v in asdict(plan.options).items() if k not in _HOW}
    files = {
        path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in plan.checkpoint.files
    }
    recipe = {"format": _FORMAT, **options, "source files": files, "pieces": weights}
    return json.loads(json.dumps(recipe))  # as it will be read again


def _report(
    plan: Plan, folder: Path, seconds: float = 0.0, peak: int = 0, resumed: bool = False
) -> Report:
    options = plan.options
    return Report(
        destination=str(folder),
        scheme=options.scheme,
        group_size=options.weight_group,
        symmetric=options.symmetric,
        method=options.method,
        format=options.weight_format,
        layers=len(plan.quantized),
        parameters=plan.parameters,
        bytes_read=plan.bytes_read,
        bytes_written=plan.bytes_written,
        files=tuple(shard.name for shard in plan.shards),
        copied=tuple(path.name for path in other_files(plan.checkpoint.folder)),
        kept=dict(plan.kept),
        indivisible=tuple(
            name for name, job in plan.quantized.items() if job.group_size != options.weight_group
        ),
        seconds=seconds,
        peak_bytes=peak,
        resumed=resumed,
    )
