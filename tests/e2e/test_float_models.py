# SPDX-License-Identifier: Apache-2.0
"""Whole seeded models whose weights are floats of 8 and 4 bits, written by the compressed-tensors
library, in vLLM against transformers with the dequantized weights; and FP8 activations against
vLLM's own."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import e2e_models
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tools import make_model
from vllm_plugin_tm.kernels import reference_float

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

PROMPT = [7, 301, 44, 12, 500, 3, 3, 99, 128, 64, 250]
BLOCK = 128
LINEAR = re.compile(
    r"((self_attn\.[qkvo]|mlp(\.experts\.\d+)?\.(gate|up|down))_proj|experts\.\d+\.w[123])\.weight$"
)
WEIGHTS: dict[str, dict[str, Any]] = {
    "nvfp4": {"num_bits": 4, "strategy": "tensor_group", "group_size": 16},
    "mxfp4": {"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    "fp8": {"num_bits": 8, "strategy": "block", "block_structure": [BLOCK, BLOCK]},
}
FORMATS = {
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "fp8": "float-quantized",
}


def scales(kind: str, weight: Tensor) -> dict[str, Tensor]:
    """Ranges from the largest weight of each group, block or tensor, as the library takes them."""
    n, k = weight.shape
    if kind == "fp8":
        blocks = weight.view(n // BLOCK, BLOCK, k // BLOCK, BLOCK).abs().amax((1, 3))
        return {"weight_scale": blocks / reference_float.E4M3_MOST}
    group = WEIGHTS[kind]["group_size"]
    ranges = weight.view(n, k // group, group).abs().amax(-1) / 6
    if kind == "mxfp4":
        return {"weight_scale": torch.exp2(ranges.log2().ceil())}
    divisor = (reference_float.E4M3_MOST * 6 / weight.abs().max()).reshape(1)
    return {
        "weight_scale": (ranges * divisor).to(torch.float8_e4m3fn).float(),
        "weight_global_scale": divisor,
    }


def quantized(plain: Path, kind: str) -> Path:
    """`plain` with every linear weight of attention, MLPs and experts in this format, beside it."""
    target = plain.with_name(f"{plain.name}-{kind}-library")
    recipe = {"recipe": 1, "kind": kind}
    return make_model.make_once(target, recipe, lambda folder: _write(plain, kind, folder))


def _write(plain: Path, kind: str, target: Path) -> None:
    weights = {"type": "float", "symmetric": True, "dynamic": False} | WEIGHTS[kind]
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry(FORMATS[kind])
    state: dict[str, Tensor] = {}
    for name, tensor in load_file(plain / make_model.WEIGHTS).items():
        if not LINEAR.search(name):
            state[name] = tensor
            continue
        weight = tensor.float()
        made = compressor.compress({"weight": weight, **scales(kind, weight)}, scheme)
        base = name.removesuffix(".weight")
        state |= {f"{base}.{leaf}": part.contiguous() for leaf, part in made.items()}
    config = json.loads((plain / "config.json").read_text())
    group = scheme.model_dump(mode="json", exclude_none=True)
    group["weights"].pop("scale_dtype", None)
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": FORMATS[kind],
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*block_sparse_moe.gate$"],
        "config_groups": {"group_0": group},
    }
    (target / "config.json").write_text(json.dumps(config))
    save_file(state, target / make_model.WEIGHTS, metadata={"format": "pt"})


def dequantized(checkpoint: Path, kind: str, folder: Path) -> Path:
    """The checkpoint in `folder` with its weights as float32 numbers."""
    config = json.loads((checkpoint / "config.json").read_text())
    del config["quantization_config"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(checkpoint / make_model.WEIGHTS)
    plain = {}
    for name, tensor in tensors.items():
        base, _, leaf = name.rpartition(".")
        scale = tensors.get(f"{base}.weight_scale")
        if leaf == "weight_packed":
            divisor = tensors.get(f"{base}.weight_global_scale")
            channels = None if divisor is None else (1 / divisor.double()).expand(len(tensor))
            bytes_ = scale.view(torch.uint8)
            how = "e8m0" if kind == "mxfp4" else "e4m3"
            weight = reference_float.dequantize_fp4(tensor, bytes_, how, channels)
            plain[f"{base}.weight"] = weight.float()
        elif leaf == "weight" and scale is not None:
            rows = scale.repeat_interleave(BLOCK, 0)
            plain[name] = reference_float.dequantize_fp8(tensor, rows).float()
        elif leaf not in ("weight_scale", "weight_global_scale"):
            plain[name] = tensor.float()
    save_file(plain, folder / make_model.WEIGHTS, metadata={"format": "pt"})
    return folder


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


KEPT = [
    ("llama", "fp8", "TMWFp8A16LinearKernel", 8),
    ("llama", "mxfp4", "TMMxFp4LinearKernel", 8),
    ("qwen2", "nvfp4", "TMNvFp4LinearKernel", 8),
    ("qwen3_moe", "mxfp4", "TMFloatExpertsKernel", 2),
    ("mixtral", "nvfp4", "TMFloatExpertsKernel", 2),
]


def test_kept_activations_equal_transformers(
    models: Path, tmp_path: Path, run_engines: Callable[..., list[dict[str, Any]]]
) -> None:
    """In float32 only sums in another order tell vLLM from transformers."""
    made = [(quantized(e2e_models.tiny(models, name), kind), kind) for name, kind, _, _ in KEPT]
    results = run_engines(
        "floats", [e2e_models.job(checkpoint, "float32", PROMPT) for checkpoint, _ in made]
    )
    for (name, kind, kernel, count), (checkpoint, _), result in zip(
        KEPT, made, results, strict=True
    ):
        (worker,) = result["workers"]
        assert (kernel, True, count) in worker["layers"], (name, kind, worker["layers"])
        plain = dequantized(checkpoint, kind, tmp_path / checkpoint.name)
        reference = AutoModelForCausalLM.from_pretrained(
            plain, dtype=torch.float32, attn_implementation="eager"
        )
        want = e2e_models.log_probabilities(reference.eval(), PROMPT)
        (got,) = result["answers"][0]["logprobs"]
        assert distance(got, want) < 2e-6, (name, kind)  # as in test_models


def test_fp8_activations_are_rounded_as_upstream_rounds_them(
    models: Path, run_engines: Callable[..., list[dict[str, Any]]]
) -> None:
    """The converter's FP8 model with the switch on and off: the same codes times the same codes,
    summed in another order, where each layer's rounding is a few hundredths."""
    plain = e2e_models.tiny(models, "llama")
    checkpoint = make_model.quantize_checkpoint(plain, plain.with_name(f"{plain.name}-fp8"), "fp8")
    answers = []
    for switch in ("1", "0"):
        (result,) = run_engines(
            f"fp8-{switch}", [e2e_models.job(checkpoint, "bfloat16", PROMPT)], VLLM_PLUGIN_TM=switch
        )
        answers.append(result["answers"][0]["logprobs"][0])
        if switch == "1":
            (worker,) = result["workers"]
            assert ("TMFp8LinearKernel", True, 8) in worker["layers"]
    reference = e2e_models.log_probabilities(
        AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32), PROMPT
    )
    on, off = answers
    assert distance(on, off) < 0.5 * distance(off, reference)
