# SPDX-License-Identifier: Apache-2.0
"""The mixture of experts that end-to-end figures are about: Qwen3-30B-A3B's shapes, as a
configuration without weights."""

import json
from pathlib import Path

import llama_1b

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCABULARY = 2048, 768, 48, 32, 4, 151936
HEAD_SIZE, EXPERTS, TOP_K = 128, 128, 8
GROUP_SIZE = llama_1b.GROUP_SIZE
SUMMARY = (
    f"Qwen3-30B-A3B shapes: hidden {HIDDEN}, {EXPERTS} experts of intermediate {INTERMEDIATE}, "
    f"{TOP_K} a token, {LAYERS} layers, {HEADS}/{KV_HEADS} heads, vocabulary {VOCABULARY}; "
    f"4-bit weights in groups of {GROUP_SIZE}, routers and head in bf16"
)

_CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": HIDDEN,
    "intermediate_size": 6144,
    "moe_intermediate_size": INTERMEDIATE,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_SIZE,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write(directory: Path, scheme: str | None) -> Path:
    """A checkpoint directory with nothing but config.json, for `--load-format dummy`; `scheme` as
    llama_1b.write has it."""
    directory.mkdir(parents=True, exist_ok=True)
    config = dict(_CONFIG)
    if scheme is not None:
        ignore = ["lm_head", r"re:.*\.gate$"]
        config["quantization_config"] = llama_1b.quantization(scheme, ignore)
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return directory


def bytes_per_token() -> int:
    """Weights that a decode step of one token reads in W4A16: what is left when memory is all that
    limits it."""
    bits = 4 + 16 / GROUP_SIZE
    attention = HIDDEN * HEAD_SIZE * (2 * HEADS + 2 * KV_HEADS)
    experts = TOP_K * 3 * HIDDEN * INTERMEDIATE
    plain = HIDDEN * EXPERTS * LAYERS + HIDDEN * VOCABULARY
    return int((attention + experts) * LAYERS * bits / 8 + 2 * plain)
