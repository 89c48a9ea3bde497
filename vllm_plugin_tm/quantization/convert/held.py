# SPDX-License-Identifier: Apache-2.0
"""What a quantized module of a checkpoint is held as, in the support matrix's words: by its tensors
and the checkpoint's quantization method. Reads no weights."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from vllm_plugin_tm.quantization import small_floats
from vllm_plugin_tm.quantization.convert.errors import ConvertError
from vllm_plugin_tm.quantization.convert.options import INT_QUANTIZED, PACK_QUANTIZED
from vllm_plugin_tm.quantization.convert.safetensors_file import Stored
from vllm_plugin_tm.quantization.support_matrix import CHANNEL, WORD_BITS

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

STACKED = "mxfp4"
"""The method whose experts lie in one tensor for each projection, as gpt-oss has them."""
METHODS = ("compressed-tensors", "fp8", "gptq", "awq", "modelopt", STACKED)
"""The quantization methods whose modules are known."""

_FP8 = "float8_e4m3fn"
_FP4_FORMATS = {"nvfp4-pack-quantized": ("nvfp4", 16), "mxfp4-pack-quantized": ("mxfp4", 32)}
_MODELOPT_CHANNELS = "ModelOpt's experts with a scale for each channel have no TM kernel"


@dataclass(frozen=True)
class Held:
    """`name` is what is shown, `shape` [N, K]; `ours` the scheme of the support matrix that would
    run it, None where there is none, for the reason `why`; `expert_why` is a reason that holds for
    routed experts only; `activation`: that between the projections, where this is an expert's."""

    name: str
    shape: tuple[int, int]
    ours: str | None = None
    weight_type: str = ""
    zero_points: bool = False
    group: int = CHANNEL
    why: str = ""
    expert_why: str = ""
    activation: str = "silu"


def of_compressed_tensors(parts: Mapping[str, Stored], scheme: "QuantizationScheme") -> Held:
    """A module of a compressed-tensors checkpoint under its scheme."""
    weights, act = scheme.weights, scheme.input_activations
    assert weights is not None
    kind, form = _text(weights.type), str(scheme.format)
    strategy = _text(weights.strategy)
    codes = parts.get("weight_packed", parts.get("weight"))
    assert codes is not None
    n, k = codes.spec.shape
    if form in _FP4_FORMATS:
        name, group = _FP4_FORMATS[form]
        return Held(f"{name} g{group}", (n, 2 * k), "fp4", name, group=group)
    if kind == "float":
        rounds = act is not None
        name = f"{'fp8' if rounds else 'fp8a16'} {strategy}"
        if weights.num_bits != 8:
            return Held(name, (n, k), why=f"{form} of {weights.num_bits} bits has no TM kernel")
        block = weights.block_structure if strategy == "block" else None
        why = "" if rounds else "FP8 experts under kept activations have no TM kernel"
        return _fp8(name, (n, k), block, why)

    bits = weights.num_bits
    if "weight_packed" in parts:
        groups = parts["weight_scale"].spec.shape[1]
        grouped = (weights.group_size or 0) > 0
        k = groups * weights.group_size if grouped else k * (WORD_BITS // bits)
    name = f"w{bits}a{act.num_bits if act else 16}"
    name += f" g{weights.group_size}" if strategy == "group" else f" {strategy}"
    name += "" if weights.symmetric else " asymmetric"
    types = {
        (PACK_QUANTIZED, True): f"uint{bits}b{1 << (bits - 1)}",
        (PACK_QUANTIZED, False): f"uint{bits}",
        (INT_QUANTIZED, True): f"int{bits}",
    }
    weight_type = types.get((form, bool(weights.symmetric)))
    if weight_type is None:
        return Held(name, (n, k), why=f"{form} of {bits} bits has no TM kernel")
    ours = f"w{4 if bits <= 4 else 8}a{8 if act else 16}"
    group = weights.group_size if (weights.group_size or 0) > 0 else CHANNEL
    # Upstream knows no method for such experts.
    why = "zero points of experts' weights under int8 activations have no TM kernel"
    zeros = not weights.symmetric
    return Held(
        *(name, (n, k), ours, weight_type, zeros, int(group or CHANNEL)),
        expert_why=why if act and zeros else "",
    )


def of_method(module: str, parts: Mapping[str, Stored], quantization: dict) -> Held:
    """A module of a checkpoint of another of the METHODS, by the shapes of its tensors. Raises
    ConvertError naming the module where these are not those of the method."""
    method = quantization["quant_method"]
    if "qweight" in parts:
        return _packed_words(module, parts, quantization)
    weight = parts.get("weight")
    if weight is None or "scale" not in "".join(parts):
        raise ConvertError(f"{module}: tensors {sorted(parts)} are not those of {method!r}")
    n, k = weight.spec.shape
    if weight.spec.dtype == torch.uint8:
        shape = (n, 2 * k)
        return Held("nvfp4 g16", shape, "fp4", "nvfp4", group=16)
    if weight.spec.dtype != torch.float8_e4m3fn:
        raise ConvertError(f"{module}.weight: dtype {weight.spec.dtype} is not that of {method!r}")
    block = quantization.get("weight_block_size") if "weight_scale_inv" in parts else None
    scale = parts.get("weight_scale")
    whole = scale is not None and scale.spec.shape in ((), (1,))
    name = f"fp8 {'block' if block else 'tensor' if whole else 'channel'}"
    channels = not block and not whole
    why = _MODELOPT_CHANNELS if method == "modelopt" and channels else ""
    return _fp8(name, (n, k), block, why)


def of_stacked_experts(module: str, blocks: Stored, scales: Stored) -> Held:
    """One of the experts whose e2m1 pairs are `blocks` u8 [E, N, K/32, 16] and whose exponents are
    `scales` u8 [E, N, K/32]. Raises ConvertError naming the module for other tensors."""
    name, group = _FP4_FORMATS["mxfp4-pack-quantized"]
    shape = blocks.spec.shape
    fits = (
        len(shape) == 4
        and shape[3] == group // 2
        and scales.spec.shape == shape[:3]
        and blocks.spec.dtype == scales.spec.dtype == torch.uint8
    )
    if not fits:
        raise ConvertError(
            f"{module}: blocks {shape} of {blocks.spec.dtype} and scales {scales.spec.shape} of "
            f"{scales.spec.dtype} are not those of {STACKED!r}: uint8 [experts, rows, groups, "
            f"{group // 2}] and uint8 [experts, rows, groups]"
        )
    held = Held(f"{name} g{group}", (shape[1], shape[2] * group), "fp4", name, group=group)
    return replace(held, activation="swigluoai")


def _packed_words(module: str, parts: Mapping[str, Stored], quantization: dict) -> Held:
    """GPTQ and AWQ: bits, sizes and groups follow from the shapes."""
    method = quantization["quant_method"]
    if not {"qweight", "qzeros", "scales"} <= set(parts):
        raise ConvertError(f"{module}: tensors {sorted(parts)} are not those of {method!r}")
    rows, columns = parts["qweight"].spec.shape
    groups, n = parts["scales"].spec.shape
    bits = parts["qzeros"].spec.shape[1] * WORD_BITS // n
    k = rows if method == "awq" else rows * WORD_BITS // bits
    if bits not in (2, 4, 8) or (method == "awq" and columns * WORD_BITS != n * bits):
        raise ConvertError(f"{module}: shapes of qweight, qzeros and scales do not fit each other")
    group = CHANNEL if groups == 1 else k // groups
    name = f"{method} w{bits}a16 {'channel' if group == CHANNEL else f'g{group}'}"
    ours = f"w{4 if bits <= 4 else 8}a16"
    if method == "awq":
        return Held(name, (n, k), ours, f"uint{bits}", True, group)
    if not quantization.get("sym", True):
        return Held(f"{name} asymmetric", (n, k), why="vLLM refuses GPTQ with zero points")
    if quantization.get("desc_act"):
        return Held(name, (n, k), why="GPTQ with activation order has no TM kernel")
    return Held(name, (n, k), ours, f"uint{bits}b{1 << (bits - 1)}", False, group)


def _fp8(name: str, shape: tuple[int, int], block: list[int] | None, expert_why: str) -> Held:
    group = CHANNEL if block is None else small_floats.block_group(shape[1], block[1])
    return Held(name, shape, "fp8", _FP8, group=group, expert_why=expert_why)


def _text(value: object) -> str:
    return str(getattr(value, "value", value))
