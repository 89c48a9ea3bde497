# SPDX-License-Identifier: Apache-2.0
"""Quantizing while loading holds the quantized model and little beside it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

pytestmark = pytest.mark.slow

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCABULARY = 2048, 8192, 4, 32, 8, 1024
LARGEST = 2 * INTERMEDIATE * HIDDEN  # gate_up
SLACK = 24 << 20  # one piece of the quantizer's in float32 for each thread, and the allocator's

LOAD = """
import json, sys, threading, time

sys.path.insert(0, sys.argv[1])
import tiny_llama
import torch

from vllm_plugin_tm.patch import apply

def resident():
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("RssAnon")]
    return int(line.split()[1]) << 10

torch.accelerator.empty_cache = lambda: None
apply.apply()
tiny_llama.load(sys.argv[2], quantization="tm_w4a16")  # all that vLLM imports and keeps
before = peak = resident()
done = threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, resident())
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
model = tiny_llama.load(sys.argv[3], quantization="tm_w4a16")
done.set()
watcher.join()
held = sum(p.numel() * p.element_size() for p in model.parameters())
json.dump({"peak": peak - before, "held": held}, open(sys.argv[4], "w"))
"""


def write(path: Path, hidden: int, intermediate: int, layers: int) -> int:
    """A bf16 Llama of normal weights, one file for each layer; its bytes."""
    width = hidden // HEADS * KV_HEADS
    sizes = {
        **{f"self_attn.{part}_proj": (hidden, hidden) for part in "qo"},
        **{f"self_attn.{part}_proj": (width, hidden) for part in "kv"},
        **{f"mlp.{part}_proj": (intermediate, hidden) for part in ("gate", "up")},
        "mlp.down_proj": (hidden, intermediate),
    }
    ends = dict.fromkeys(("model.embed_tokens", "lm_head"), (VOCABULARY, hidden))
    files: list[dict[str, torch.Tensor]] = [
        {f"{name}.weight": torch.randn(size).bfloat16() for name, size in ends.items()}
    ]
    files[0]["model.norm.weight"] = torch.ones(hidden).bfloat16()
    for index in range(layers):
        layer = f"model.layers.{index}"
        state = {
            f"{layer}.{name}.weight": torch.randn(size).bfloat16() for name, size in sizes.items()
        }
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{layer}.{norm}.weight"] = torch.ones(hidden).bfloat16()
        files.append(state)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    places = {}
    for index, state in enumerate(files):
        name = f"model-{index:05}-of-{len(files) - 1:05}.safetensors"
        places |= dict.fromkeys(state, name)
        save_file(state, path / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(tensor.numel() * 2 for state in files for tensor in state.values())


def test_a_model_that_does_not_fit_in_16_bits_loads(tmp_path):
    """The bound is the quantized model and two of its largest layers in 16 bits, which is less than
    the model in 16 bits."""
    write(tmp_path / "small", 256, 512, 1)
    plain = write(tmp_path / "model", HIDDEN, INTERMEDIATE, LAYERS)
    result = tmp_path / "result.json"
    arguments = [Path(__file__).parent, tmp_path / "small", tmp_path / "model", result]
    run = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, arguments)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(result.read_text())
    allowed = found["held"] + 2 * 2 * LARGEST + SLACK
    assert found["held"] < 0.35 * plain
    assert allowed < plain, "the test shows nothing"
    assert found["peak"] <= allowed, f"{found['peak'] / 1e6:.0f} of {allowed / 1e6:.0f} MB"
