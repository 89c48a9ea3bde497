# SPDX-License-Identifier: Apache-2.0
"""`vllm-tm convert` against llm-compressor's model-free path: the same checkpoint and machine, turn
by turn. Run as `python -m benchmarks.convert_peer --peer-python ENV/bin/python`."""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from tools import layout

_PEER = """
import sys, time
from llmcompressor import model_free_ptq
start = time.monotonic()
model_free_ptq(sys.argv[1], sys.argv[2], scheme="W4A16", max_workers=int(sys.argv[3]), device="cpu")
print(time.monotonic() - start)
"""


def make(folder: Path, layers: int, shards: int) -> int:
    """A checkpoint of MLP matrices, 4096 x 8192 each, in so many files: its number of weights."""
    folder.mkdir(parents=True)
    where: dict[str, str] = {}
    for shard in range(shards):
        tensors = {
            f"model.layers.{layer}.mlp.fc1.weight": (torch.randn(4096, 8192) * 0.02).bfloat16()
            for layer in range(shard, layers, shards)
        }
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text('{"model_type": "any"}')
    return layers * 4096 * 8192


def ours(source: Path, target: Path, workers: int) -> tuple[float, float]:
    """Seconds of the conversion and of the whole command."""
    start = time.monotonic()
    command = [sys.executable, "-m", "vllm_plugin_tm.cli", "convert", source, target, "--json"]
    # Group 128: what the peer's W4A16 is.
    command += ["--scheme", "w4a16", "--group-size", "128", "--workers", str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)["seconds"], time.monotonic() - start


def peer(python: str, source: Path, target: Path, workers: int) -> tuple[float, float]:
    """The same of model_free_ptq."""
    start = time.monotonic()
    command = [python, "-c", _PEER, source, target, str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1]), time.monotonic() - start


def main() -> None:
    """Prints a line for each round and the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", required=True, help="an interpreter with llm-compressor")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory(dir=layout.BUILD) as folder:
        source, target = Path(folder) / "src", Path(folder) / "dst"
        weights = make(source, args.layers, args.shards)
        for _ in range(args.rounds):
            for name in rates:
                for path in source.iterdir():
                    path.read_bytes()  # into the page cache
                if name == "ours":
                    seconds, whole = ours(source, target, args.workers)
                else:
                    seconds, whole = peer(args.peer_python, source, target, args.workers)
                shutil.rmtree(target)
                rates[name].append(weights / seconds / 1e6)
                print(f"{name}: {seconds:.1f} s ({whole:.1f} with imports)", flush=True)
    for name, found in rates.items():
        spread = f"{min(found):.0f} to {max(found):.0f}"
        print(f"{name}: {statistics.median(found):.0f} M weights/s ({spread})")
    ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["peer"], strict=True))
    print(f"ratio, median of rounds: {ratio:.1f}")


if __name__ == "__main__":
    main()
