# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of float weights for the end-to-end tests, written by the compressed-tensors library,
and the same with their weights as numbers."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools import make_model
from vllm_plugin_tm.kernels import reference_float

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


def as_deepseek(checkpoint: Path, block: int) -> Path:
    """A checkpoint of the library's or the converter's FP8 blocks as the fp8 method has it, whose
    scales are called weight_scale_inv, beside it."""
    target = checkpoint.with_name(f"{checkpoint.name}-deepseek")
    target.mkdir(exist_ok=True)
    tensors = {
        name.replace(".weight_scale", ".weight_scale_inv"): tensor.float()
        if name.endswith(".weight_scale")
        else tensor
        for name, tensor in load_file(checkpoint / make_model.WEIGHTS).items()
    }
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [block, block],
        "ignored_layers": ["lm_head"],
    }
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / make_model.WEIGHTS, metadata={"format": "pt"})
    return target


def without_rounding(checkpoint: Path) -> Path:
    """The same weights for activations that are kept, beside it."""
    target = checkpoint.with_name(f"{checkpoint.name}-kept")
    target.mkdir(exist_ok=True)
    config = json.loads((checkpoint / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] = None
    (target / "config.json").write_text(json.dumps(config))
    shutil.copyfile(checkpoint / make_model.WEIGHTS, target / make_model.WEIGHTS)
    return target
