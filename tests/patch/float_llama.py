# SPDX-License-Identifier: Apache-2.0
"""The tiny Llama of tiny_llama with weights that are floats of 8 or 4 bits, in every form that a
checkpoint may have, and what each of its layers stands for."""

from dataclasses import dataclass
from typing import Any

import tiny_llama
import torch
from torch import Tensor

from vllm_plugin_tm.kernels import reference_float

INTERMEDIATE = 192
BLOCK = 64  # upstream refuses fused parts that end inside a block
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Form:
    """One kind of checkpoint.

    `weights` is tensor, channel, block, mxfp4 or nvfp4; `rounding` the op's word for activations;
    `method` is upstream's quantization method.
    """

    weights: str
    rounding: str
    scheme: str
    kernel: str
    method: str = "compressed-tensors"
    scale_dtype: torch.dtype = torch.float32
    block: int = BLOCK

    @property
    def fp8(self) -> bool:
        return self.weights in ("tensor", "channel", "block")

    @property
    def group(self) -> int:
        return {"block": self.block, "mxfp4": 32, "nvfp4": 16}.get(self.weights, -1)


def _args(bits: int, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float", "symmetric": True, "dynamic": False} | more


def quantization(form: Form, ignore: tuple[str, ...] = ("lm_head",)) -> dict[str, Any]:
    """The checkpoint's quantization configuration."""
    if form.method == "modelopt":
        return modelopt("FP8" if form.fp8 else "NVFP4", ignore)
    if form.method == "fp8":
        config = {
            "quant_method": "fp8",
            "activation_scheme": "static" if form.rounding == "tensor" else "dynamic",
            "ignored_layers": list(ignore),
        }
        return config | ({"weight_block_size": [form.block] * 2} if form.weights == "block" else {})
    activations: dict[str, Any] | None = {
        "none": None,
        "token": _args(8, strategy="token", dynamic=True),
        "group": _args(8, strategy="group", group_size=form.block, dynamic=True),
        "tensor": _args(8, strategy="tensor"),
    }[form.rounding]
    if form.fp8:
        kind = "float-quantized"
        weights = _args(8, strategy=form.weights)
        if form.weights == "block":
            weights["block_structure"] = [form.block] * 2
    else:
        kind = f"{form.weights}-pack-quantized"
        strategy = "tensor_group" if form.weights == "nvfp4" else "group"
        weights = _args(4, strategy=strategy, group_size=form.group)
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "config_groups": {"group_0": scheme},
    }


def modelopt(algorithm: str, ignore: tuple[str, ...] = ("lm_head",)) -> dict[str, Any]:
    """ModelOpt's configuration of a checkpoint that is of one algorithm."""
    return {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "ignore": list(ignore),
        "producer": {"name": "modelopt"},
    }


def as_modelopt(state: dict[str, Tensor], algorithm: str) -> dict[str, Tensor]:
    """The numbers of a compressed-tensors checkpoint under ModelOpt's names and shapes."""
    result = {}
    for name, tensor in state.items():
        base, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            result[f"{base}.weight"] = tensor
            if algorithm == "NVFP4":
                result[f"{base}.input_scale"] = torch.tensor(0.01)
        elif leaf == "weight_global_scale":
            # What compressed-tensors divides by multiplies here.
            result[f"{base}.weight_scale_2"] = 1 / tensor.reshape(())
        elif leaf in ("weight_scale", "input_scale") and not algorithm.endswith("NVFP4"):
            result[name] = tensor.reshape(()) if tensor.numel() == 1 else tensor.flatten()
        else:
            result[name] = tensor
    return result


def tensors(form: Form, seed: int = 0) -> dict[str, Tensor]:
    """The checkpoint's tensors: all codes but NaN, scales of every part different."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    plain = tiny_llama.tensors(intermediate=INTERMEDIATE, seed=seed)
    for name, tensor in plain.items():
        base, _, leaf = name.rpartition(".")
        if leaf == "weight_shape":
            n, k = tensor.tolist()
            state |= {
                f"{base}.{key}": value
                for key, value in layer_tensors(form, n, k, generator).items()
            }
        elif leaf not in ("weight_packed", "weight_scale"):
            state[name] = tensor
    return state


def layer_tensors(form: Form, n: int, k: int, generator: torch.Generator) -> dict[str, Tensor]:
    """One layer's tensors by the last parts of their names."""

    def numbers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).to(torch.uint8)

    def scales(*shape: int) -> Tensor:
        return (0.5 + torch.rand(shape, generator=generator)) / (110 * k**0.5)

    if not form.fp8:
        weight = {"weight_packed": numbers(0, 256, n, k // 2)}
        groups = k // form.group
        if form.weights == "mxfp4":
            return weight | {"weight_scale": numbers(119, 123, n, groups)}
        bytes_ = numbers(0x30, 0x48, n, groups).view(E4M3)
        divisor = 20 + 40 * torch.rand(1, generator=generator)
        return weight | {"weight_scale": bytes_, "weight_global_scale": divisor}
    codes = numbers(0, 254, n, k)
    weight = {"weight": torch.where(codes >= 0x7F, codes + 1, codes).view(E4M3)}
    if form.weights == "block":
        name = "weight_scale_inv" if form.method == "fp8" else "weight_scale"
        scale = scales(n // form.block, k // form.block)
        if form.scale_dtype != torch.float32:
            scale = torch.exp2(scale.log2().round())
        weight[name] = scale.to(form.scale_dtype)
    else:
        shape = (n, 1) if form.weights == "channel" else () if form.method == "fp8" else (1,)
        weight["weight_scale"] = scales(*shape)
    if form.rounding == "tensor":
        shape = () if form.method == "fp8" else (1,)
        weight["input_scale"] = torch.full(shape, 0.0061)
    return weight


def product(
    form: Form, state: dict[str, Tensor], names: list[str], x: Tensor
) -> tuple[Tensor, Tensor]:
    """What the oracle says of the layers `names` on x, side by side, and how far from it a right
    kernel may be."""
    parts = [_product(form, state, name, x) for name in names]
    y, allowed = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    return y, allowed


def _product(form: Form, state: dict[str, Tensor], name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    if not form.fp8:
        scale = state[f"{name}.weight_scale"].view(torch.uint8)
        kind = "e8m0" if form.weights == "mxfp4" else "e4m3"
        divisor = state.get(f"{name}.weight_global_scale")
        weight = state[f"{name}.weight_packed"]
        channels = None if divisor is None else (1 / divisor).expand(len(weight))
        fp4 = (x, weight, scale, channels, None, kind)
        return reference_float.fp4_linear(*fp4), reference_float.fp4_tolerance(*fp4)
    weight = state[f"{name}.weight"]
    n = len(weight)
    scale = state.get(f"{name}.weight_scale", state.get(f"{name}.weight_scale_inv")).float()
    if form.weights == "block":
        # Each input its own scale: no grouping is the oracle's business.
        scale = scale.repeat_interleave(form.block, 0).repeat_interleave(form.block, 1)
    else:
        scale = scale.reshape(-1, 1).expand(n, 1)
    fp8 = (x, weight, scale, None, form.rounding, state.get(f"{name}.input_scale"), form.block)
    return reference_float.fp8_linear(*fp8), reference_float.fp8_tolerance(*fp8)


_CT8, _CT16 = "CompressedTensorsW8A8Fp8", "CompressedTensorsW8A16Fp8"
_W8, _W16, _FP8 = "TMFp8LinearKernel", "TMWFp8A16LinearKernel", "Fp8LinearMethod"
FORMS = {
    "tensor token": Form("tensor", "token", _CT8, _W8),
    "tensor static": Form("tensor", "tensor", _CT8, _W8),
    "channel token": Form("channel", "token", _CT8, _W8),
    "channel static": Form("channel", "tensor", _CT8, _W8),
    "block": Form("block", "group", _CT8, _W8),
    "tensor a16": Form("tensor", "none", _CT16, _W16),
    "channel a16": Form("channel", "none", _CT16, _W16),
    "block a16": Form("block", "none", _CT16, _W16),
    "fp8 tensor": Form("tensor", "token", _FP8, _W8, "fp8"),
    "fp8 static": Form("tensor", "tensor", _FP8, _W8, "fp8"),
    "fp8 block": Form("block", "group", _FP8, _W8, "fp8"),
    "fp8 block ue8m0": Form("block", "group", _FP8, _W8, "fp8", torch.float8_e8m0fnu),
    "mxfp4": Form("mxfp4", "none", "CompressedTensorsW4A4Mxfp4", "TMMxFp4LinearKernel"),
    "nvfp4": Form("nvfp4", "none", "CompressedTensorsW4A4Fp4", "TMNvFp4LinearKernel"),
}
