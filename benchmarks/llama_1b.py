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
    f"{HEADS}/{KV_HEADS} heads, vocabulary {VOCABULARY}; 4-bit weights in groups of {GROUP_SIZE}, "
    "8-bit ones per channel, the head in bf16"
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

# What llm-compressor writes for its presets of these names: symmetric weights, activations rounded
# per token or not at all, all linear layers but the head.
_GROUPED = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": GROUP_SIZE,
    "dynamic": False,
}
_BY_CHANNEL = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "channel",
    "dynamic": False,
}
_PER_TOKEN = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "token",
    "dynamic": True,
}
_SCHEMES: dict[str, tuple[str, dict, dict | None]] = {
    "w4a16": ("pack-quantized", _GROUPED, None),
    "w8a8": ("int-quantized", _BY_CHANNEL, _PER_TOKEN),
    "w4a8": ("int-quantized", _GROUPED, _PER_TOKEN),
}


def write(directory: Path, scheme: str | None) -> Path:
    """A checkpoint directory with nothing but config.json, for `--load-format dummy`.

    Args:
        directory: made where missing.
        scheme: "w4a16", "w8a8" or "w4a8"; None for a model that is not quantized.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = dict(_CONFIG)
    if scheme is not None:
        config["quantization_config"] = quantization(scheme, ["lm_head"])
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return directory


def quantization(scheme: str, ignore: list[str]) -> dict:
    """The quantization_config of a checkpoint in `scheme` with these modules left alone."""
    layout, weights, activations = _SCHEMES[scheme]
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ignore,
        "config_groups": {"group_0": group},
    }
