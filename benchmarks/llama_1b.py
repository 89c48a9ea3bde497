# SPDX-License-Identifier: Apache-2.0
"""The model that the end-to-end figures are about: Llama-3.2-1B's shapes with the vocabulary of
SmolLM2, as a configuration without weights."""

import json
from pathlib import Path

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCABULARY = 2048, 8192, 16, 32, 8, 49152
HEAD_SIZE = HIDDEN // HEADS
ROPE_THETA = 500000.0
NORM_EPS = 1e-5
GROUP_SIZE = 128
SUMMARY = (
    f"Llama-1B shapes: hidden {HIDDEN}, intermediate {INTERMEDIATE}, {LAYERS} layers, "
    f"{HEADS}/{KV_HEADS} heads, vocabulary {VOCABULARY}, W4A16 group {GROUP_SIZE}"
)

_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_SIZE,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "rope_theta": ROPE_THETA,
    "rms_norm_eps": NORM_EPS,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# What llm-compressor writes for the W4A16 preset: symmetric, all linear layers but the head.
_W4A16 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": GROUP_SIZE,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    },
}


def write(directory: Path, *, quantized: bool) -> Path:
    """A checkpoint directory with nothing but config.json, for `--load-format dummy`."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {**_CONFIG, **({"quantization_config": _W4A16} if quantized else {})}
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return directory
