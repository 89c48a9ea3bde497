# SPDX-License-Identifier: Apache-2.0
"""The oracle of the ops that round their activations to int8: the rounding in float32, as
compressed-tensors defines it, and everything after it in float64. Calls no kernel; weights as
`reference` takes them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_plugin_tm.kernels.reference import FP32_UNIT, SIGMAS, codes_and_zeros

_LEAST, _MOST = -128.0, 127.0


@dataclass(frozen=True)
class Quantized:
    """Activations as integers, cut into groups along K (one for a scale per token).

    codes [..., G, K/G], scale [..., G, 1], zero_point [..., G, 1]: whole numbers and scales as
    float32. What is not finite stays so: as a code, as a scale, or as both.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor


def quantize_x(x: Tensor, symmetric: bool = True, groups: int = 1) -> Quantized:
    """Dynamic int8 quantization of x [..., K] in float32, as compressed-tensors defines it.

    Symmetric: scale = max|x| / 127.5, zero point 0. Else: the range of x, widened to hold 0, is cut
    into 255 steps, and the zero point is what -128 - min / scale rounds to. A scale of 0 becomes
    the float32 epsilon. Halves are rounded to even. One scale for each row and each of `groups`
    equal parts of K.
    """
    x = x.float().unflatten(-1, (groups, -1))
    if symmetric:
        scale = x.abs().amax(-1, keepdim=True) / 127.5
        zero_point = torch.zeros_like(scale)
    else:
        low = x.amin(-1, keepdim=True).clamp(max=0)
        high = x.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / 255.0
        # 0 / 0 where all of x is zero: every zero point means the same there.
        zero_point = (_LEAST - low / scale).nan_to_num(_LEAST).clamp(_LEAST, _MOST).round()
    scale = scale.masked_fill(scale == 0, torch.finfo(torch.float32).eps)
    return Quantized(_round(x, scale, zero_point), scale, zero_point)


def quantize_x_static(x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Quantized:
    """x [..., K] with the float32 [1] scale and int32 [1] zero point of a checkpoint. Infinities
    are the outermost codes, NaN stays."""
    x = x.float().unsqueeze(-2)
    zero = torch.zeros_like(scale) if zero_point is None else zero_point.float()
    every = (*x.shape[:-1], 1)
    return Quantized(_round(x, scale, zero), scale.expand(every), zero.expand(every))


def _round(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return (x / scale + zero_point).clamp(_LEAST, _MOST).round()


def w4a8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    x_groups: bool = False,
    bits: int = 4,
) -> Tensor:
    """The op on x [..., K] and weights as `reference.dequantize` takes them; float64 [..., N].

    x is quantized symmetrically with one scale for each row, or, with x_groups, for each row and
    group of the weights.
    """
    quantized = quantize_x(x, groups=scale.shape[1] if x_groups else 1)
    return _sum(_terms(quantized, weight, scale, zero_point, bits), bias)


def w4a8_tolerance(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    x_groups: bool = False,
    bits: int = 4,
) -> Tensor:
    """How far a right kernel may be from `w4a8_linear`: same arguments, float64 [..., N]."""
    quantized = quantize_x(x, groups=scale.shape[1] if x_groups else 1)
    return _tolerance(_terms(quantized, weight, scale, zero_point, bits), bias, x.dtype)


def w8a8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    x_symmetric: bool = True,
) -> Tensor:
    """The op on x [..., K], weight int8 [N, K], scale float32 [N, 1]; float64 [..., N].

    x_scale float32 [1] and x_zero_point int32 [1], where given, quantize x; else each row does so
    itself, with a zero point unless x_symmetric.
    """
    quantized = _quantized(x, x_scale, x_zero_point, x_symmetric)
    return _sum(_terms(quantized, weight, scale, None, 8), bias)


def w8a8_tolerance(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    x_symmetric: bool = True,
) -> Tensor:
    """How far a right kernel may be from `w8a8_linear`: same arguments, float64 [..., N]."""
    quantized = _quantized(x, x_scale, x_zero_point, x_symmetric)
    return _tolerance(_terms(quantized, weight, scale, None, 8), bias, x.dtype)


def _quantized(
    x: Tensor, scale: Tensor | None, zero_point: Tensor | None, symmetric: bool
) -> Quantized:
    if scale is None:
        return quantize_x(x, symmetric)
    return quantize_x_static(x, scale, zero_point)


def _terms(
    x: Quantized, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int
) -> Tensor:
    """What each group of weights adds to the result: float64 [G, ..., N].

    The sums of integers are exact, as every partial sum is below 2**53; only then come the scales.
    """
    k = x.codes.shape[-2] * x.codes.shape[-1]
    codes, zeros = codes_and_zeros(weight, scale, zero_point, k, bits)
    n, groups = scale.shape
    weights = codes.view(n, groups, -1) - zeros.unsqueeze(-1)
    integers = x.codes.double() - x.zero_point.double()
    lead = integers.shape[:-2]
    rows = integers.reshape(lead.numel(), groups, k // groups)
    sums = torch.bmm(rows.transpose(0, 1), weights.permute(1, 2, 0)).view(groups, *lead, n)
    # One scale of x for a row, or one for each of its groups.
    x_scale = x.scale.double().movedim(-2, 0)
    return sums * x_scale * scale.double().t().view(groups, *(1 for _ in lead), n)


def _sum(terms: Tensor, bias: Tensor | None) -> Tensor:
    y = terms.sum(0)
    return y if bias is None else y + bias.double()


def _tolerance(terms: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """How far a right kernel may be from `_sum`, float64.

    The kernel sums integers exactly. Then it rounds in float32: each group's sum, its product with
    a scale of x, and its addition to the total; at the end the product with a row's scale of x and
    the addition of the bias. These are at most G + 4 roundings on the way of any summand, each of
    at most 2**-24 of the sum of absolute values. Their worst case is taken, or, where it is
    smaller, six deviations of a random walk of so many steps. One rounding to the output dtype
    follows.
    """
    steps = terms.shape[0] + 4
    absolute = terms.abs().sum(0)
    if bias is not None:
        absolute = absolute + bias.double().abs()
    info = torch.finfo(dtype)
    walk = min(steps, SIGMAS * steps**0.5) * FP32_UNIT * absolute
    smallest = info.smallest_normal * info.eps  # the fixed step of a subnormal output
    return info.eps / 2 * _sum(terms, bias).abs() + walk * (1 + info.eps) + smallest
