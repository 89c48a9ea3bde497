# SPDX-License-Identifier: Apache-2.0
"""The oracle: what each op means, in float64 PyTorch. Slow and plain on purpose; calls no kernel.

Weights come in as a checkpoint holds them, so that the oracle shares no code with the packing it
judges. Bits are taken apart by the compressed-tensors library, never here.
"""

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from torch import Tensor

# Standard deviations that a rounding error may reach. Rounding errors of a sum behave as a random
# walk (Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019): sqrt(n)
# steps instead of the worst case n. Six deviations leave one false alarm in 5e8 elements.
_SIGMAS = 6.0
_FP32_UNIT = 2.0**-24  # half the distance from 1 to the next float32


def dequantize_w4(
    weight_packed: Tensor, scale: Tensor, zero_point: Tensor | None, k: int
) -> Tensor:
    """The real weights (code - zero_point) * scale.

    Args:
        weight_packed: int32 [N, ceil(K/8)], eight 4-bit codes per element, lowest bits first.
        scale: floating [N, G], one per row and group of K/G neighbours along K.
        zero_point: int32 [ceil(N/8), G], eight 4-bit codes per element along N; None
            means code 8 everywhere.
        k: the input size K, which the packed shape only bounds.

    Returns:
        float64 [N, K], exact: a 4-bit difference times a scale of at most 24 bits fits 53.

    Raises:
        ValueError: shapes that do not belong together.
    """
    codes, zeros = _codes_minus_8(weight_packed, scale, zero_point, k)
    group = k // scale.shape[1]
    zero, step = (t.repeat_interleave(group, dim=1) for t in (zeros, scale.double()))
    return (codes - zero) * step


def w4a16_linear(
    x: Tensor,
    weight_packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x @ W.T + bias, W from `dequantize_w4`: x floating [..., K], bias [N]; float64 [..., N]."""
    y = x.double() @ dequantize_w4(weight_packed, scale, zero_point, x.shape[-1]).T
    return y if bias is None else y + bias.double()


def w4a16_tolerance(
    x: Tensor,
    weight_packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """How far a right kernel may be from `w4a16_linear`: same arguments, float64 [..., N].

    The kernel sums products with exact integer weights in float32 inside a group, multiplies by
    the float32 scale, sums the groups in float32 and rounds once to x's dtype. So the error is
    - half a unit in the last place of the output dtype, and
    - a float32 random walk of (group + G + a few) steps, each at most 2**-24 of the sum of
      |scale * x * code|, where a zero point is a second summand beside the code, because it is
      applied through the group's sum of x.
    """
    k = x.shape[-1]
    codes, zeros = _codes_minus_8(weight_packed, scale, zero_point, k)
    groups = scale.shape[1]
    group = k // groups
    magnitude = codes.abs() + zeros.abs().repeat_interleave(group, dim=1)
    step = scale.double().abs().repeat_interleave(group, dim=1)
    absolute = x.double().abs() @ (magnitude * step).T
    if bias is not None:
        absolute = absolute + bias.double().abs()
    info = torch.finfo(x.dtype)
    y = w4a16_linear(x, weight_packed, scale, zero_point, bias)
    walk = _SIGMAS * (group + groups + 4) ** 0.5 * _FP32_UNIT * absolute
    # A subnormal output has a fixed step; the bf16 dot also flushes float32 subnormals to zero.
    smallest = info.smallest_normal * info.eps + k * 8 * torch.finfo(torch.float32).smallest_normal
    return info.eps / 2 * y.abs() + walk * (1 + info.eps) + smallest


def _codes_minus_8(
    weight_packed: Tensor, scale: Tensor, zero_point: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """float64 codes [N, K] and zero points [N, G], both less 8 (the library's signed form)."""
    if scale.ndim != 2 or scale.shape[1] == 0 or k % scale.shape[1]:
        raise ValueError(f"scale: expected [N, G] with G dividing K={k}, got {list(scale.shape)}")
    n, groups = scale.shape
    if weight_packed.shape != (n, -(-k // 8)):
        raise ValueError(
            f"weight_packed: expected [{n}, {-(-k // 8)}], got {list(weight_packed.shape)}"
        )
    codes = unpack_from_int32(weight_packed, 4, torch.Size((n, k))).double()
    if zero_point is None:
        return codes, torch.zeros(n, groups, dtype=torch.float64, device=scale.device)
    if zero_point.shape != (-(-n // 8), groups):
        raise ValueError(
            f"zero_point: expected [{-(-n // 8)}, {groups}], got {list(zero_point.shape)}"
        )
    return codes, unpack_from_int32(zero_point, 4, torch.Size((n, groups)), packed_dim=0).double()
