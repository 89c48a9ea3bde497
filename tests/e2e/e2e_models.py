# SPDX-License-Identifier: Apache-2.0
"""Checkpoints for the end-to-end tests, and transformers with the same weights, dequantized."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tools import make_model
from vllm_plugin_tm.kernels import reference

# Heads, key/value heads, both widths and a half of each divide by 128 or leave whole groups of it,
# so that all formats and two shards fit.
_TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    # Large enough that log-probabilities differ by many units: a wrong layer is seen.
    "initializer_range": 0.08,
}


def tiny(folder: Path, architecture: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """A seeded bf16 model of `architecture` (llama, qwen2: bias on q, k and v) under `folder`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(architecture, **_TINY | changes)
    changed = "".join(f"-{name}{value}" for name, value in sorted(changes.items()))
    target = folder / f"{architecture}-seed{seed}{changed}"
    recipe = {"recipe": 1, "seed": seed, "config": config.to_diff_dict()}
    if make_model.is_made(target, json.loads(json.dumps(recipe))):
        return target
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers begins with zeros
            torch.nn.init.normal_(parameter, std=0.5)
        elif "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(target)
    (target / make_model.STAMP).write_text(json.dumps(recipe))
    return target


def quantized(source: Path, group_size: int | None = 32, symmetric: bool = True) -> Path:
    """`source` as W4A16 beside it; group_size None is channel."""
    name = f"{source.name}-w4a16-{group_size or 'channel'}{'' if symmetric else '-asymmetric'}"
    return make_model.quantize_checkpoint(
        source, source.with_name(name), group_size=group_size, symmetric=symmetric
    )


def dequantized(checkpoint: Path, scale_factor: float = 1.0) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors in float32, quantized ones as the oracle reads them (exact)."""
    tensors = load_file(checkpoint / make_model.WEIGHTS)
    plain = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part == "weight_packed":
            weight = reference.dequantize_w4(
                tensor,
                tensors[f"{layer}.weight_scale"],
                tensors.get(f"{layer}.weight_zero_point"),
                int(tensors[f"{layer}.weight_shape"][1]),
            )
            plain[f"{layer}.weight"] = (weight * scale_factor).float()
        elif part not in ("weight_scale", "weight_zero_point", "weight_shape"):
            plain[name] = tensor.float()
    return plain


def transformers_model(
    checkpoint: Path, dtype: torch.dtype = torch.float32, scale_factor: float = 1.0
) -> torch.nn.Module:
    """transformers' own model with the dequantized weights, rounded to `dtype`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    missing, surplus = model.load_state_dict(dequantized(checkpoint, scale_factor), strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert set(missing) <= tied, missing
    assert not surplus, surplus
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """Row i: of the token after tokens[i]; float32 [len(tokens), vocabulary]."""
    return model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
