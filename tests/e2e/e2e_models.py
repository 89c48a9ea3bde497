# SPDX-License-Identifier: Apache-2.0
"""Checkpoints for the end-to-end tests, and transformers with the same weights, dequantized."""

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file, save_file

from tools import make_model
from vllm_plugin_tm.quantization.convert import SCHEMES

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

_EXPERTS = {
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "head_dim": 64,
        "norm_topk_prob": True,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 256},
    # Shared experts, groups of experts, sigmoid scores with a bias, routed scaling, a dense layer.
    "deepseek_v3": {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "moe_intermediate_size": 128,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "norm_topk_prob": True,
        "q_lora_rank": None,
        "kv_lora_rank": 128,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 64,
        "num_key_value_heads": 4,
    },
}
"""What a tiny model with routed experts has beside _TINY."""

# Gated DeltaNet and full attention in turns; heads of 256, a quarter of which is rotated.
_QWEN3_5 = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    },
}

_OTHERS = {
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5_moe_text": _QWEN3_5
    | {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 256,
    },
}
"""What other tiny models have beside _TINY."""


def tiny(folder: Path, architecture: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """A seeded bf16 model of `architecture` (llama, qwen2: bias on q, k and v) under `folder`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    own = (_EXPERTS | _OTHERS).get(architecture, {})
    config = AutoConfig.for_model(architecture, **_TINY | own | changes)
    changed = "".join(f"-{name}{value}" for name, value in sorted(changes.items()))
    changed = re.sub(r"[^\w.-]+", "_", changed)  # vLLM reads brackets in a path as a pattern
    target = folder / f"{architecture}-seed{seed}{changed}"
    recipe = {"recipe": 1, "seed": seed, "config": config.to_diff_dict()}

    def write(target: Path) -> None:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).bfloat16()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # transformers begins with zeros
                torch.nn.init.normal_(parameter, std=0.5)
            elif "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        model.save_pretrained(target)

    return make_model.make_once(target, json.loads(json.dumps(recipe)), write)


def quantized(
    source: Path, group_size: int = 32, symmetric: bool = True, num_bits: int = 4
) -> Path:
    """`source` with weight-only integers, beside it; group size -1 is channel."""
    group = "channel" if group_size == make_model.CHANNEL else group_size
    name = f"{source.name}-w{num_bits}a16-{group}{'' if symmetric else '-asymmetric'}"
    # The kernel runs 2 bits; the converter does not offer what rounding to nearest makes of them.
    with patch.dict(SCHEMES, w2a16=replace(SCHEMES["w4a16"], bits=2)):
        return make_model.quantize_checkpoint(
            source,
            source.with_name(name),
            f"w{num_bits}a16",
            group_size=group_size,
            symmetric=symmetric,
        )


def dequantized(checkpoint: Path, scale_factor: float = 1.0) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors in float32, quantized ones as real numbers: (code - zero point)
    times scale in float64, which is exact, read by the compressed-tensors library."""
    tensors = load_file(checkpoint / make_model.WEIGHTS)
    config = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    bits = config["config_groups"]["group_0"]["weights"]["num_bits"]
    plain = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        scale = tensors.get(f"{layer}.weight_scale")
        if part in ("weight_packed", "weight") and scale is not None:
            codes = _codes(layer, tensors, bits)
            zeros = tensors.get(f"{layer}.weight_zero_point")
            zero = torch.zeros(scale.shape)
            if zeros is not None:
                zero = unpack_from_int32(zeros, bits, scale.shape, packed_dim=0)
            width = codes.shape[1] // scale.shape[1]
            zero, step = (t.double().repeat_interleave(width, 1) for t in (zero, scale))
            plain[f"{layer}.weight"] = ((codes.double() - zero) * step * scale_factor).float()
        elif part not in ("weight_scale", "weight_zero_point", "weight_shape"):
            plain[name] = tensor.float()
    return plain


def _codes(layer: str, tensors: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """Signed codes [N, K], packed on disk or one to a byte."""
    packed = tensors.get(f"{layer}.weight_packed")
    if packed is None:
        return tensors[f"{layer}.weight"]
    shape = torch.Size(tensors[f"{layer}.weight_shape"].tolist())
    return unpack_from_int32(packed, bits, shape)


def transformers_model(
    checkpoint: Path, dtype: torch.dtype = torch.float32, scale_factor: float = 1.0
) -> torch.nn.Module:
    """transformers' own model with the dequantized weights, rounded to `dtype`."""
    return transformers_model_of(checkpoint, dequantized(checkpoint, scale_factor), dtype)


def transformers_model_of(
    checkpoint: Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """transformers' own model of the checkpoint's configuration with the weights `tensors`, rounded
    to `dtype`."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        # Through files: transformers fuses the experts that a checkpoint has one by one.
        _write_plain(checkpoint, Path(folder), tensors)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(info["missing_keys"]) <= tied, info["missing_keys"]
    assert not info["unexpected_keys"], info["unexpected_keys"]
    return model.eval()


def dequantized_checkpoint(checkpoint: Path) -> Path:
    """The same model with its weights as float32 numbers, beside it."""
    target = checkpoint.with_name(f"{checkpoint.name}-dequantized")
    target.mkdir(exist_ok=True)
    _write_plain(checkpoint, target, dequantized(checkpoint))
    return target


def _write_plain(checkpoint: Path, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / make_model.WEIGHTS, metadata={"format": "pt"})


def job(checkpoint: Path, dtype: str, prompt: list[int]) -> dict[str, Any]:
    """An engine for engine_job.py that answers one prompt with all log-probabilities, and says what
    its workers run."""
    engine = {
        "model": str(checkpoint),
        "dtype": dtype,
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "max_logprobs": -1,
        "kv_cache_memory_bytes": 2**25,
        "enable_prefix_caching": False,
    }
    return {"engine": engine, "prompts": [prompt], "workers": True}


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """Row i: of the token after tokens[i]; float32 [len(tokens), vocabulary]."""
    return model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)


def check_greedy(
    references: tuple[torch.nn.Module, torch.nn.Module],
    given: list[int],
    ours: list[int],
    disputed_share: float = 1 / 8,
) -> None:
    """Greedy tokens `ours` after the prompt `given` are those of the references (exact, in bf16),
    each checked with the tokens before it given (so one early tie hides nothing).

    Where our token is not the reference's first choice, bf16 must be unable to tell the two apart:
    the float32 reference's gap between them is at most twice what bf16 does to a logit there. That
    is measured: the largest difference between the bf16 and the float32 reference over the ten
    likeliest tokens, and at least one unit of bf16 in the last place of the logit.
    """
    tokens = torch.tensor([given + ours[:-1]])
    with torch.no_grad():
        exact, rounded = (model(tokens).logits[0, len(given) - 1 :].float() for model in references)
    disputed = 0
    for place, token in enumerate(ours):
        best = int(exact[place].argmax())
        if token == best:
            continue
        disputed += 1
        likely = exact[place].topk(10).indices
        unit = 2.0 ** (exact[place, best].abs().log2().floor().item() - 7)
        noise = max(unit, float((rounded[place] - exact[place])[likely].abs().max()))
        gap = float(exact[place, best] - exact[place, token])
        assert gap <= 2 * noise, f"token {place}: {token}, not {best}; gap {gap}, noise {noise}"
    # Text is mostly not on a knife's edge; a broken layer would put every other token there. Models
    # of random weights are closer to it.
    assert disputed <= len(ours) * disputed_share, f"{disputed} of {len(ours)} tokens"
