# SPDX-License-Identifier: Apache-2.0
"""A Qwen3-MoE of a few kilobytes with quantized experts, written as a checkpoint; tiny_llama.load
loads it."""

import json

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, VOCABULARY, HEADS = 64, 32, 4, 2, 256, 2
EXPERTS_NAME = "model.layers.0.mlp.experts"
IGNORE = ("lm_head", "re:.*self_attn.*", "re:.*mlp.gate$")


def tensors(group=16, symmetric=True, bits=4, packed=True, seed=0):
    """The checkpoint's tensors: everything but the experts in bfloat16. `packed`: pack-quantized
    weights, else int-quantized, a byte each."""
    generator = torch.Generator().manual_seed(seed)

    def dense(*shape):
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(torch.bfloat16)

    layer = "model.layers.0"
    state = {
        "model.embed_tokens.weight": dense(VOCABULARY, HIDDEN),
        "lm_head.weight": dense(VOCABULARY, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
        f"{layer}.mlp.gate.weight": dense(EXPERTS, HIDDEN),
    }
    for norm in ("input_layernorm", "post_attention_layernorm"):
        state[f"{layer}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    for norm in ("q_norm", "k_norm"):
        state[f"{layer}.self_attn.{norm}.weight"] = torch.ones(
            HIDDEN // HEADS, dtype=torch.bfloat16
        )
    for name in ("q", "k", "v", "o"):
        state[f"{layer}.self_attn.{name}_proj.weight"] = dense(HIDDEN, HIDDEN)

    most = 1 << (bits - 1)
    for expert in range(EXPERTS):
        for part, n, k in (
            ("gate", INTERMEDIATE, HIDDEN),
            ("up", INTERMEDIATE, HIDDEN),
            ("down", HIDDEN, INTERMEDIATE),
        ):
            name = f"{EXPERTS_NAME}.{expert}.{part}_proj"
            groups = 1 if group == -1 else k // group
            codes = torch.randint(-most, most, (n, k), dtype=torch.int8, generator=generator)
            scale = (torch.rand(n, groups, generator=generator) + 0.5) / (most * k**0.5)
            state[f"{name}.weight_scale"] = scale.to(torch.bfloat16)
            if not packed:
                state[f"{name}.weight"] = codes
                continue
            state[f"{name}.weight_packed"] = pack_to_int32(codes, bits)
            state[f"{name}.weight_shape"] = torch.tensor([n, k])
            if not symmetric:
                zeros = torch.randint(-2, 2, (n, groups), dtype=torch.int8, generator=generator)
                words = pack_to_int32(zeros, bits, packed_dim=0).contiguous()
                state[f"{name}.weight_zero_point"] = words
    return state


def save(
    path, state, group=16, symmetric=True, bits=4, packed=True, quantization=None, rounded=None
):
    """Writes config.json and model.safetensors into `path`; `quantization` replaces the
    compressed-tensors configuration that the other arguments describe. `rounded`: whether
    activations are int8 per token, None for where weights are bytes."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group,
        "dynamic": False,
    }
    per_token = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    scheme = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": per_token if (not packed if rounded is None else rounded) else None,
    }
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "moe_intermediate_size": INTERMEDIATE,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN // HEADS,
        "hidden_act": "silu",
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "quantization_config": quantization
        or {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized" if packed else "int-quantized",
            "quantization_status": "compressed",
            "ignore": list(IGNORE),
            "config_groups": {"group_0": scheme},
        },
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
