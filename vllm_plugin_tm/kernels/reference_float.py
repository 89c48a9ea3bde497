# SPDX-License-Identifier: Apache-2.0
"""The oracle of the ops whose weights are floats of 8 or 4 bits: the rounding of activations in
float32, as vLLM's QuantFP8 defines it, and everything else in float64. Calls no kernel; weights
come in as a checkpoint holds them, and are taken apart by torch and compressed-tensors."""

from dataclasses import dataclass

import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from torch import Tensor

from vllm_plugin_tm.kernels.reference import FP32_UNIT, SIGMAS

E4M3_MOST = 448.0
LEAST_SCALE = 1.0 / (E4M3_MOST * 512.0)
_SCALE_TYPES = {"e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Rounded:
    """Activations [..., K] as float32 values of e4m3 and their scales [..., K], one for each; what
    is not finite stays so, as a value, a scale, or both."""

    values: Tensor
    scale: Tensor


def round_x(
    x: Tensor, rounding: str, x_scale: Tensor | None = None, group_size: int = -1
) -> Rounded:
    """x [..., K] rounded to e4m3 in float32.

    `rounding`: "none" keeps x; "token" takes a scale max|x| / 448 of each row, at least
    1 / (448 * 512), and "group" one of each `group_size` neighbours along K, whose last group may
    be shorter; "tensor" takes x_scale, float32 [1]. Halves are rounded to even, values beyond 448
    are 448. A group's values are divided by their scale, all others multiplied by its reciprocal.
    """
    x = x.float()
    if rounding == "none":
        return Rounded(x, torch.ones_like(x))
    if rounding == "tensor":
        assert x_scale is not None
        scale = x_scale.float().expand(x.shape)
    else:
        scale = (_largest(x.abs(), rounding, group_size) / E4M3_MOST).clamp(min=LEAST_SCALE)
    scaled = x / scale if rounding == "group" else x * scale.reciprocal()
    values = scaled.clamp(-E4M3_MOST, E4M3_MOST).to(torch.float8_e4m3fn).float()
    return Rounded(values, scale)


def _largest(x: Tensor, rounding: str, group_size: int) -> Tensor:
    """For each element of x [..., K] the largest one of its row, or in "group" of its group."""
    k = x.shape[-1]
    width = k if rounding == "token" or group_size == -1 else group_size
    groups = torch.nn.functional.pad(x, (0, -k % width)).unflatten(-1, (-1, width))
    return groups.amax(-1, keepdim=True).expand(groups.shape).flatten(-2)[..., :k]


def rounded_x_tolerance(
    x: Tensor, off: Tensor, rounding: str, x_scale: Tensor | None = None, group_size: int = -1
) -> Tensor:
    """How far a right kernel's rounded x may be from `round_x` of float64 x [..., K], where its x
    may be off by `off` [..., K]: of two roundings that this makes possible either is right."""
    scale = round_x(x, rounding, x_scale, group_size).scale.double()
    scale_off = torch.full_like(x, 4 * FP32_UNIT)
    if rounding != "tensor":
        # The scale moves with the largest value, and every quotient with it.
        largest = _largest(x.abs(), rounding, group_size).clamp(min=LEAST_SCALE * E4M3_MOST)
        scale_off += _largest(off, rounding, group_size) / largest
    wide = off + x.abs() * scale_off
    low, high = (
        ((x + d) / scale).clamp(-E4M3_MOST, E4M3_MOST).to(torch.float8_e4m3fn).double()
        for d in (-wide, wide)
    )
    return (high - low + torch.maximum(low.abs(), high.abs()) * scale_off) * scale


def dequantize_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """float64 [N, K] of weight float8_e4m3fn [N, K] and scale float32 [N, G], one for each row and
    group of K/G neighbours."""
    k = weight.shape[1]
    return weight.double() * scale.double().repeat_interleave(k // scale.shape[1], dim=1)


def dequantize_fp4(
    weight: Tensor, scale: Tensor, scale_type: str, channel_scale: Tensor | None = None
) -> Tensor:
    """float64 [N, K] of weight uint8 [N, K/2], e2m1 with even k in the low half, and the bytes of
    scales, uint8 [N, G], "e8m0" or "e4m3"; channel_scale float32 [N] or None."""
    n, half = weight.shape
    codes = unpack_fp4_from_uint8(weight, n, 2 * half, dtype=torch.float32).double()
    group = 2 * half // scale.shape[1]
    steps = scale.view(_SCALE_TYPES[scale_type]).float().double().repeat_interleave(group, dim=1)
    if channel_scale is not None:
        steps = steps * channel_scale.double()[:, None]
    return codes * steps


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    x_rounding: str = "none",
    x_scale: Tensor | None = None,
    x_group_size: int = -1,
) -> Tensor:
    """x @ W.T + bias, x from `round_x`, W from `dequantize_fp8`; float64 [..., N]. In "group" the
    size -1 means that of the weights' groups."""
    rounded = _rounded(x, weight, scale, x_rounding, x_scale, x_group_size)
    y = (rounded.values.double() * rounded.scale.double()) @ dequantize_fp8(weight, scale).T
    return y if bias is None else y + bias.double()


def fp8_tolerance(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    x_rounding: str = "none",
    x_scale: Tensor | None = None,
    x_group_size: int = -1,
) -> Tensor:
    """How far a right kernel may be from `fp8_linear`: same arguments, float64 [..., N]."""
    rounded = _rounded(x, weight, scale, x_rounding, x_scale, x_group_size)
    real = rounded.values.double() * rounded.scale.double()
    return _tolerance(real, dequantize_fp8(weight, scale), scale.shape[1], bias, x.dtype)


def fp4_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    channel_scale: Tensor | None,
    bias: Tensor | None,
    scale_type: str,
) -> Tensor:
    """x @ W.T + bias, W from `dequantize_fp4`; float64 [..., N]."""
    y = x.double() @ dequantize_fp4(weight, scale, scale_type, channel_scale).T
    return y if bias is None else y + bias.double()


def fp4_tolerance(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    channel_scale: Tensor | None,
    bias: Tensor | None,
    scale_type: str,
) -> Tensor:
    """How far a right kernel may be from `fp4_linear`: same arguments, float64 [..., N]."""
    real = dequantize_fp4(weight, scale, scale_type, channel_scale)
    return _tolerance(x.double(), real, scale.shape[1], bias, x.dtype)


def _rounded(
    x: Tensor, weight: Tensor, scale: Tensor, rounding: str, x_scale: Tensor | None, group_size: int
) -> Rounded:
    if group_size == -1:
        group_size = weight.shape[1] // scale.shape[1]
    return round_x(x, rounding, x_scale, group_size)


def _tolerance(
    x: Tensor, weight: Tensor, groups: int, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The bound of `reference.w4a16_tolerance`, for real activations [..., K] and weights [N, K]:
    products are exact, a group's sum, its scales, the sum of groups and the bias are float32."""
    k = x.shape[-1]
    y, absolute = x @ weight.T, x.abs() @ weight.abs().T
    if bias is not None:
        y, absolute = y + bias.double(), absolute + bias.double().abs()
    info = torch.finfo(dtype)
    walk = SIGMAS * (k // groups + groups + 6) ** 0.5 * FP32_UNIT * absolute
    # The bf16 dot flushes float32 subnormals to zero, in x and in its sums.
    flushed = k * weight.abs().amax(-1) * torch.finfo(torch.float32).smallest_normal
    smallest = info.smallest_normal * info.eps + flushed
    return info.eps / 2 * y.abs() + walk * (1 + info.eps) + smallest
