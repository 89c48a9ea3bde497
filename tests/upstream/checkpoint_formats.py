# SPDX-License-Identifier: Apache-2.0
"""How one linear weight is stored in each checkpoint format that upstream's tests name.

Random codes with small random scales stand for a quantized weight [N, K]: nothing is quantized
here. Each format gives the checkpoint's quantization config and the tensors of one layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

Tensors = dict[str, torch.Tensor]
WEIGHT_STD = 0.02
# Standard deviation of uniform signed codes, by bits: sqrt((2^(2b) - 1) / 12).
CODE_STD = {4: 4.61, 8: 73.9}
FP8_BLOCK = 128
FP8_STD = 100.0  # e4m3 holds up to 448
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column within eight that AWQ stores at each nibble


@dataclass(frozen=True)
class Format:
    """`config` is config.json's quantization_config; `layer(n, k, rng)` gives a layer's tensors
    by the suffix of their names."""

    config: dict[str, Any]
    layer: Callable[[int, int, torch.Generator], Tensors]


def plain(n: int, k: int, rng: torch.Generator) -> Tensors:
    """An unquantized layer: weight bf16 [n, k]."""
    return {"weight": (torch.randn(n, k, generator=rng) * WEIGHT_STD).bfloat16()}


def awq(group_size: int) -> Format:
    """AutoAWQ: qweight i32 [K, N/8], qzeros i32 [K/g, N/8], in AWQ's order, scales f16 [K/g, N]."""

    def layer(n: int, k: int, rng: torch.Generator) -> Tensors:
        groups = k // group_size
        return {
            "qweight": _awq_pack(_codes(4, (k, n), rng)),
            "qzeros": _awq_pack(_codes(4, (groups, n), rng).clamp(-2, 1)),
            "scales": _scales(4, (groups, n), rng).half(),
        }

    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True}
    return Format(config | {"version": "gemm"}, layer)


def gptq(group_size: int) -> Format:
    """GPTQ without reordering: qweight i32 [K/8, N], qzeros i32 [K/g, N/8] (each zero point less
    one), scales f16 [K/g, N], g_idx i32 [K]."""

    def layer(n: int, k: int, rng: torch.Generator) -> Tensors:
        groups = k // group_size
        middle = torch.full((groups, n), -1, dtype=torch.int8)
        return {
            "qweight": pack_to_int32(_codes(4, (k, n), rng), 4, packed_dim=0).contiguous(),
            "qzeros": pack_to_int32(middle, 4),
            "scales": _scales(4, (groups, n), rng).half(),
            "g_idx": (torch.arange(k) // group_size).int(),
        }

    config = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "sym": True}
    return Format(config | {"desc_act": False, "checkpoint_format": "gptq"}, layer)


def auto_round(group_size: int) -> Format:
    """AutoRound in its GPTQ packing."""
    config = {"quant_method": "auto-round", "bits": 4, "group_size": group_size, "sym": True}
    config |= {"packing_format": "auto_round:auto_gptq", "data_type": "int"}
    return Format(config, gptq(group_size).layer)


def ct_w4a16(group_size: int | None, symmetric: bool, ignore: tuple[str, ...] = ()) -> Format:
    """compressed-tensors pack-quantized; group_size None is one scale per channel."""
    strategy = "channel" if group_size is None else "group"

    def layer(n: int, k: int, rng: torch.Generator) -> Tensors:
        groups = 1 if group_size is None else k // group_size
        tensors = {
            "weight_packed": pack_to_int32(_codes(4, (n, k), rng), 4),
            "weight_scale": _scales(4, (n, groups), rng).bfloat16(),
            "weight_shape": torch.tensor([n, k]),
        }
        if not symmetric:
            zero_points = _codes(4, (n, groups), rng).clamp(-2, 2)
            tensors["weight_zero_point"] = pack_to_int32(zero_points, 4, packed_dim=0).contiguous()
        return tensors

    weights = _args(4, "int", strategy, symmetric, group_size=group_size)
    return Format(_ct("pack-quantized", weights, None, ignore), layer)


def ct_w8a8(weight_strategy: str, dynamic: bool, symmetric: bool = True) -> Format:
    """compressed-tensors int-quantized: weight i8 [N, K], weight_scale bf16 [1] or [N, 1]; with
    static activations input_scale bf16 [1] and, asymmetric, input_zero_point i8 [1]."""

    def layer(n: int, k: int, rng: torch.Generator) -> Tensors:
        shape = (1,) if weight_strategy == "tensor" else (n, 1)
        tensors = {
            "weight": _codes(8, (n, k), rng),
            "weight_scale": _scales(8, shape, rng).bfloat16(),
        }
        if not dynamic:
            tensors["input_scale"] = torch.tensor([0.05], dtype=torch.bfloat16)
            if not symmetric:
                tensors["input_zero_point"] = torch.tensor([3], dtype=torch.int8)
        return tensors

    inputs = _args(8, "int", "token" if dynamic else "tensor", symmetric, dynamic=dynamic)
    weights = _args(8, "int", weight_strategy, True)
    return Format(_ct("int-quantized", weights, inputs), layer)


def ct_fp8_static() -> Format:
    """compressed-tensors float-quantized, one scale for the weight and one for its input."""

    def layer(n: int, k: int, rng: torch.Generator) -> Tensors:
        scale = torch.tensor([WEIGHT_STD / FP8_STD], dtype=torch.float32)
        return {
            "weight": _fp8(n, k, rng),
            "weight_scale": scale,
            "input_scale": torch.tensor([0.02], dtype=torch.float32),
        }

    weights, inputs = _args(8, "float", "tensor", True), _args(8, "float", "tensor", True)
    return Format(_ct("float-quantized", weights, inputs), layer)


def ct_fp8_block() -> Format:
    """compressed-tensors float-quantized, weight scales f32 per 128 x 128 block."""

    def layer(n: int, k: int, rng: torch.Generator) -> Tensors:
        return {"weight": _fp8(n, k, rng), "weight_scale": _block_scales(n, k)}

    weights = _args(8, "float", "block", True) | {"block_structure": [FP8_BLOCK, FP8_BLOCK]}
    inputs = _args(8, "float", "group", True, dynamic=True, group_size=FP8_BLOCK)
    return Format(_ct("float-quantized", weights, inputs), layer)


def fp8_block(plain: tuple[str, ...] = ()) -> Format:
    """DeepSeek's block FP8, the format "fp8": weight e4m3 [N, K] and weight_scale_inv; it knows no
    patterns, so what is `plain` has its whole name."""

    def layer(n: int, k: int, rng: torch.Generator) -> Tensors:
        return {"weight": _fp8(n, k, rng), "weight_scale_inv": _block_scales(n, k)}

    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    if plain:
        config["modules_to_not_convert"] = list(plain)
    return Format(config | {"weight_block_size": [FP8_BLOCK, FP8_BLOCK]}, layer)


def ct_nvfp4(weight_only: bool) -> Format:
    """compressed-tensors nvfp4: weight_packed u8 [N, K/2], weight_scale e4m3 [N, K/16] and global
    scales f32 [1]."""
    group_size = 16

    def layer(n: int, k: int, rng: torch.Generator) -> Tensors:
        tensors = {
            "weight_packed": torch.randint(0, 256, (n, k // 2), generator=rng, dtype=torch.uint8),
            "weight_scale": torch.ones(n, k // group_size).to(torch.float8_e4m3fn),
            "weight_global_scale": torch.tensor([100.0]),
        }
        if not weight_only:
            tensors["input_global_scale"] = torch.tensor([100.0])
        return tensors

    weights = _args(4, "float", "tensor_group", True, group_size=group_size)
    local = None if weight_only else weights | {"dynamic": "local"}
    return Format(_ct("nvfp4-pack-quantized", weights, local), layer)


def mxfp4(rows: int, k: int, rng: torch.Generator) -> Tensors:
    """gpt-oss' experts: e2m1 pairs u8 [rows, K/32, 16] and exponents u8 [rows, K/32]."""
    blocks = torch.randint(0, 256, (rows, k // 32, 16), generator=rng, dtype=torch.uint8)
    return {"blocks": blocks, "scales": torch.full((rows, k // 32), 120, dtype=torch.uint8)}


def _args(
    num_bits: int,
    kind: str,
    strategy: str,
    symmetric: bool,
    dynamic: bool = False,
    group_size: int | None = None,
) -> dict[str, Any]:
    return {
        "num_bits": num_bits,
        "type": kind,
        "strategy": strategy,
        "symmetric": symmetric,
        "dynamic": dynamic,
        "group_size": group_size,
    }


def _ct(
    layout: str,
    weights: dict[str, Any],
    inputs: dict[str, Any] | None,
    ignore: tuple[str, ...] = (),
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$", *ignore],
    }


def _codes(bits: int, shape: tuple[int, int], rng: torch.Generator) -> torch.Tensor:
    half = 1 << (bits - 1)
    return torch.randint(-half, half, shape, generator=rng, dtype=torch.int8)


def _scales(bits: int, shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    spread = 0.5 + torch.rand(shape, generator=rng)  # scales differ, so that mixing them up shows
    return spread * (WEIGHT_STD / CODE_STD[bits])


def _fp8(n: int, k: int, rng: torch.Generator) -> torch.Tensor:
    return (torch.randn(n, k, generator=rng) * FP8_STD).clamp(-448, 448).to(torch.float8_e4m3fn)


def _block_scales(n: int, k: int) -> torch.Tensor:
    return torch.full((-(-n // FP8_BLOCK), -(-k // FP8_BLOCK)), WEIGHT_STD / FP8_STD)


def _awq_pack(codes: torch.Tensor) -> torch.Tensor:
    rows, columns = codes.shape
    ordered = codes.view(rows, columns // 8, 8)[:, :, list(AWQ_ORDER)].reshape(rows, columns)
    return pack_to_int32(ordered, 4)
