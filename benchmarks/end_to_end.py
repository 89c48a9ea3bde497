# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of whole engines on one model: vLLM with the plugin and without it, on W4A16,
W8A8 and W4A8 checkpoints, vLLM in bf16, and llama.cpp, in turns.

    python benchmarks/end_to_end.py --json end_to_end.json
    python benchmarks/end_to_end.py --model qwen3-30b-a3b    # experts; upstream refuses them

Batch 1, greedy, made-up weights (`--load-format dummy`): speed does not depend on their values.
"""

import argparse
import contextlib
import datetime
import json
import shlex
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import llama_1b
import llamacpp_peer
import peer_venv
import qwen3_30b
from workers import (
    ASK_DECODE,
    ASK_PREFILL,
    Engine,
    Worker,
    WorkerError,
    end_with_this_process,
)

from vllm_plugin_tm import envs
from vllm_plugin_tm.bench import amx, limits, machine
from vllm_plugin_tm.kernels import ops

SCHEMA = 2
LLAMACPP = "llama.cpp Q4_0"


@dataclass(frozen=True)
class _Kind:
    """An engine under its name in reports. vLLM's have a checkpoint's `scheme`, None for bf16, run
    with the plugin or without, and log `chosen` once their layers have a kernel. `arguments` are
    more of vllm.LLM's; `beside` is an engine with the plugin that this one is compared with too."""

    title: str
    scheme: str | None = None
    plugin: bool = False
    chosen: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    beside: str = ""


def _online(**options: Any) -> dict[str, Any]:
    """Arguments for quantizing the bf16 model while it is loaded, in the groups of the others."""
    options = {"group_size": llama_1b.GROUP_SIZE, **options}
    return {"quantization": "tm_w4a16", "additional_config": {"tm_online": options}}


_ENGINES = {
    "plugin-w4a16": _Kind("plugin W4A16", "w4a16", True, "Using TMWNA16LinearKernel"),
    "upstream-w4a16": _Kind("upstream W4A16", "w4a16", False, "Using CPUWNA16LinearKernel"),
    "plugin-w8a8": _Kind("plugin W8A8", "w8a8", True, "Selected TMInt8ScaledMMLinearKernel"),
    "upstream-w8a8": _Kind("upstream W8A8", "w8a8", False, "Selected CPUInt8ScaledMMLinearKernel"),
    "plugin-w4a8": _Kind("plugin W4A8", "w4a8", True, "Using TMW4A8IntLinearKernel"),
    "bf16": _Kind("upstream bf16"),
    "llamacpp": _Kind(LLAMACPP),
    "plugin-online": _Kind("plugin tm_w4a16", None, True, "Using TMWNA16LinearKernel", _online()),
    "plugin-online-head": _Kind(
        "plugin tm_w4a16 with head",
        None,
        True,
        "Using TMWNA16LinearKernel",
        _online(lm_head="w8a16"),
        beside="plugin tm_w4a16",
    ),
}


_MODELS = {"llama-1b": llama_1b, "qwen3-30b-a3b": qwen3_30b}
# The other model: upstream refuses its experts, in bf16 it takes 61 GB.
_DEFAULT_ENGINES = {
    "llama-1b": tuple(name for name, kind in _ENGINES.items() if not kind.arguments),
    "qwen3-30b-a3b": ("plugin-w4a16",),
}


def main() -> int:
    """Exit status 0 when measured, 1 when an engine failed, 2 when llama.cpp cannot be had."""
    args = _arguments()
    if args.no_amx:
        amx.hide()
    end_with_this_process()
    with contextlib.ExitStack() as stack:
        directory = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory.mkdir(parents=True, exist_ok=True)
        try:
            running = [stack.enter_context(_start(name, args, directory)) for name in args.engines]
            measured = _measure(running, args)
        except WorkerError as error:
            print(error, file=sys.stderr)
            return 1
        except peer_venv.PeerError as error:
            print(f"llama.cpp is not to be had: {error}", file=sys.stderr)
            return 2
        peaks = {w.engine.name: w.peak_bytes() for w in running}
    report = _report(args, measured, {w.engine.name: w.load_s for w in running}, peaks)
    if args.model == "qwen3-30b-a3b":
        report["bound"] = _bound(args.threads)
    print(_text(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--engines",
        type=_engine_names,
        metavar="NAME,...",
        help=f"of {', '.join(_ENGINES)} (default: all with checkpoints that can run)",
    )
    parser.add_argument("--model", choices=_MODELS, default="llama-1b")
    parser.add_argument("--threads", type=int, default=len(machine.usable_cpus()))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--decode", type=int, default=128, metavar="TOKENS")
    parser.add_argument("--prefill", type=int, default=512, metavar="TOKENS")
    parser.add_argument("--no-amx", action="store_true", help="as vllm-tm bench has it")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="for model files, logs and venv")
    args = parser.parse_args()
    args.engines = args.engines or _DEFAULT_ENGINES[args.model]
    return args


def _engine_names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in _ENGINES:
            known = ", ".join(_ENGINES)
            raise argparse.ArgumentTypeError(f"{name!r} is not an engine; known are {known}")
    return names


def _start(name: str, args: argparse.Namespace, directory: Path) -> Worker:
    kind = _ENGINES[name]
    print(f"loading {kind.title} ...", file=sys.stderr, flush=True)
    log = directory / f"{name}.log"
    if name == "llamacpp":
        return Worker(llamacpp_peer.engine(LLAMACPP, directory, args.threads), log)
    model = _MODELS[args.model].write(directory / (kind.scheme or "bf16"), kind.scheme)
    cpus = machine.usable_cpus()[: args.threads]
    environment: dict[str, str | None] = {
        "VLLM_PLUGIN_TM": "1" if kind.plugin else None,
        # All processors for the model: the figures are about kernels, and nothing else runs.
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    if kind.plugin and amx.is_hidden() and envs.isa() == "auto":
        environment["VLLM_PLUGIN_TM_ISA"] = amx.isa()
    worker = Path(__file__).with_name("vllm_worker.py")
    command = [sys.executable, str(worker), str(model), json.dumps(kind.arguments)]
    others = tuple(k.chosen for k in _ENGINES.values() if k.chosen not in ("", kind.chosen))
    return Worker(Engine(kind.title, command, environment, kind.chosen, others), log)


def _measure(running: list[Worker], args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """engine -> "decode" or "prefill" -> tokens per second, one entry per round."""
    kinds = {ASK_DECODE: args.decode, ASK_PREFILL: args.prefill}
    found = {w.engine.name: {kind: [] for kind in kinds} for w in running}
    for turn in range(args.repeats + 1):
        for kind, tokens in kinds.items():
            for worker in running:
                rate = worker.ask(kind, tokens)
                name = worker.engine.name
                print(f"round {turn}: {name}: {kind} {rate:.1f} tok/s", file=sys.stderr, flush=True)
                if turn:  # round 0 warms up
                    found[name][kind].append(rate)
    return found


def _bound(threads: int) -> dict[str, float]:
    """Decode steps per second if reading weights were all of it: at what memory yields now, when
    the engines have ended."""
    ops.load()
    read = limits.LimitLoops(machine.describe(threads).llc_bytes).measure().read_gbps
    step = qwen3_30b.bytes_per_token()
    return {"read_gbps": read, "bytes_per_token": step, "tokens_per_s": read * 1e9 / step}


def _report(
    args: argparse.Namespace,
    measured: dict,
    load_s: dict[str, float],
    peak_bytes: dict[str, int],
) -> dict:
    """Rates of every round, their medians, and, from paired rounds, the ratio of each engine with
    the plugin to each without, or to the one it is compared with."""
    ours = {kind.title: kind.beside for kind in _ENGINES.values() if kind.plugin}
    ratios = {
        own: {
            name: {
                kind: median(a / b for a, b in zip(measured[own][kind], rates[kind], strict=True))
                for kind in rates
            }
            for name, rates in measured.items()
            if name not in ours or name == ours[own]
        }
        for own in measured
        if own in ours
    }
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": asdict(machine.describe(args.threads)),
        "model": _MODELS[args.model].SUMMARY,
        "tokens": {ASK_DECODE: args.decode, ASK_PREFILL: args.prefill},
        "rates": measured,
        "medians": {n: {k: median(v) for k, v in rates.items()} for n, rates in measured.items()},
        "plugin_over": ratios,
        "load_s": load_s,
        "peak_bytes": peak_bytes,
    }


def _text(report: dict) -> str:
    lines = [f"{report['model']}; {report['date']}"]
    for name, medians in report["medians"].items():
        lines.append(
            f"{name:16s} decode {medians[ASK_DECODE]:7.1f} tok/s, "
            f"prefill {medians[ASK_PREFILL]:7.1f} tok/s, loaded in {report['load_s'][name]:.0f} s, "
            f"at most {report['peak_bytes'][name] / 2**30:.1f} GiB in memory"
        )
    if "bound" in report:
        bound = report["bound"]
        lines.append(
            f"bound by memory: {bound['tokens_per_s']:.1f} tok/s "
            f"({bound['bytes_per_token'] / 1e9:.2f} GB a token at {bound['read_gbps']:.1f} GB/s)"
        )
    for own, others in report["plugin_over"].items():
        for name, ratio in others.items():
            decode, prefill = ratio[ASK_DECODE], ratio[ASK_PREFILL]
            lines.append(f"{own} over {name}: decode {decode:.2f}x, prefill {prefill:.2f}x")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
