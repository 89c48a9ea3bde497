# SPDX-License-Identifier: Apache-2.0
"""Seconds that loading and reloading a model take, turn by turn: in bf16, quantized while loaded,
and from a W4A16 checkpoint. Run as `python -m benchmarks.loading`; the files lie in the page cache.

Loading is everything between an empty process that has imported vLLM and a model that can run;
reloading is vLLM's reload_weights of the same files into the running engine; "layers" is what of it
is the quantized layers' own: copying their tensors from the files, checking and packing them, and
copying them to where they serve.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import llama_1b
from tools import layout

_SHARDS = 4


@dataclass(frozen=True)
class _Kind:
    """Arguments of vllm.LLM beside the model, which is `checkpoint`, and the plugin's switch."""

    checkpoint: str
    plugin: bool
    arguments: dict[str, Any] = field(default_factory=dict)


_KINDS = {
    "bf16": _Kind("bf16", False),
    "tm_w4a16": _Kind(
        "bf16",
        True,
        {
            "quantization": "tm_w4a16",
            "additional_config": {"tm_online": {"group_size": llama_1b.GROUP_SIZE}},
        },
    ),
    "W4A16 checkpoint": _Kind("w4a16", True),
}


def make(folder: Path) -> int:
    """The Llama-1B shapes with random weights in bf16: the number of weights of linear layers."""
    llama_1b.write(folder, None)
    q, kv = llama_1b.HEADS * llama_1b.HEAD_SIZE, llama_1b.KV_HEADS * llama_1b.HEAD_SIZE
    hidden, inner = llama_1b.HIDDEN, llama_1b.INTERMEDIATE
    linear = {
        **{
            f"self_attn.{name}_proj": (rows, hidden)
            for name, rows in (("q", q), ("k", kv), ("v", kv))
        },
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    where: dict[str, str] = {}
    for shard in range(_SHARDS):
        tensors = {}
        for layer in range(shard, llama_1b.LAYERS, _SHARDS):
            prefix = f"model.layers.{layer}"
            for name, shape in linear.items():
                tensors[f"{prefix}.{name}.weight"] = _random(*shape)
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}.{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        if shard == 0:
            tensors["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
            tensors["model.embed_tokens.weight"] = _random(llama_1b.VOCABULARY, hidden)
        file = f"model-{shard + 1:05d}-of-{_SHARDS:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return llama_1b.LAYERS * sum(n * k for n, k in linear.values())


def _random(n: int, k: int) -> torch.Tensor:
    return (torch.randn(n, k) * 0.02).bfloat16()


def convert(source: Path, target: Path) -> None:
    """The same weights as a W4A16 checkpoint."""
    command = [sys.executable, "-m", "vllm_plugin_tm.cli", "convert", source, target]
    command += ["--scheme", "w4a16", "--group-size", str(llama_1b.GROUP_SIZE)]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def _timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    return run


def _time_layers(seconds: list[float]) -> None:
    """Adds to the last of `seconds` what processing layers of ours takes as they arrive."""
    from vllm.model_executor.model_loader.reload import layerwise

    from vllm_plugin_tm import layer_table

    process = layerwise._layerwise_process

    def timed(layer: torch.nn.Module, info: Any) -> None:
        start = time.perf_counter()
        process(layer, info)
        if layer_table.tm_kernel_of(layer) is not None:
            seconds[-1] += time.perf_counter() - start

    layerwise._layerwise_process = timed


def _own_bytes() -> int:
    """Memory of this process that no file backs."""
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines["RssAnon"].split()[0]) * 1024


def child(model: str, arguments: str, reloads: int) -> None:
    """Loads, then reloads; prints what it took as a line of JSON."""
    from vllm import LLM
    from vllm.v1.worker import cpu_model_runner

    seconds: list[float] = []
    before = _own_bytes()
    cpu_model_runner.get_model = _timed(cpu_model_runner.get_model, seconds)
    llm = LLM(
        model=model,
        dtype="bfloat16",
        max_model_len=256,
        max_num_seqs=1,
        enforce_eager=True,
        skip_tokenizer_init=True,
        **json.loads(arguments),
    )
    again: list[float] = []
    layers: list[float] = []
    reload = _timed(llm.collective_rpc, again)
    resident = _own_bytes() - before
    _time_layers(layers)
    for _ in range(reloads):
        layers.append(0.0)
        reload("reload_weights", kwargs={"weights_path": model})
    found = {"load": seconds, "reload": again, "layers": layers, "resident": [resident / 1e9]}
    print(json.dumps(found))


def _run(kind: _Kind, folder: Path, reloads: int) -> dict[str, list[float]]:
    path = folder / kind.checkpoint
    for file in path.iterdir():
        file.read_bytes()  # into the page cache
    environment = dict(os.environ) | {
        # One process for engine and model: its loading can be timed.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    environment.pop("VLLM_PLUGIN_TM", None)
    if kind.plugin:
        environment["VLLM_PLUGIN_TM"] = "1"
    command = [sys.executable, "-m", "benchmarks.loading", "--child", str(path)]
    command += ["--arguments", json.dumps(kind.arguments), "--reloads", str(reloads)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints a line for each round, then medians and spreads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--reloads", type=int, default=3, help="in each round")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--arguments", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.arguments, args.reloads)
        return
    found: dict[str, dict[str, list[float]]] = {name: {} for name in _KINDS}
    layout.BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=layout.BUILD) as directory:
        folder = Path(directory)
        weights = make(folder / "bf16")
        convert(folder / "bf16", folder / "w4a16")
        for turn in range(args.rounds):
            for name, kind in _KINDS.items():
                measured = _run(kind, folder, args.reloads)
                print(f"round {turn + 1}: {name}: {measured}", flush=True)
                for what, values in measured.items():
                    found[name].setdefault(what, []).extend(values)
    for name, values in found.items():
        for what, each in values.items():
            unit = "GB" if what == "resident" else "s"
            spread = f"{min(each):.2f} to {max(each):.2f}"
            print(f"{name}: {what} {statistics.median(each):.2f} {unit} ({spread})")
    ratio = statistics.median(
        a / b for a, b in zip(found["tm_w4a16"]["load"], found["bf16"]["load"], strict=True)
    )
    print(f"tm_w4a16 loads in {ratio:.2f} times the seconds of bf16 (paired rounds)")
    for what, of in (("reload", "the whole of it"), ("layers", "the quantized layers alone")):
        rate = weights / 2 / statistics.median(found["W4A16 checkpoint"][what]) / 1e9
        print(f"reloading a W4A16 checkpoint, {of}: {rate:.2f} GB of 4-bit data a second")


if __name__ == "__main__":
    main()
