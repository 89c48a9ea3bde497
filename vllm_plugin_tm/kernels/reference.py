# SPDX-License-Identifier: Apache-2.0
"""The oracle of the weights and of the ops that keep their activations: float64 PyTorch.

What each op means, slow and plain on purpose; calls no kernel. Weights come in as a checkpoint
holds them, so that the oracle shares no code with the packing it judges. Bits are taken apart by
the compressed-tensors library where words hold whole codes. Ops that round their activations to
integers are in reference_int8.
"""

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from torch import Tensor

# Standard deviations that a rounding error may reach. Rounding errors of a sum behave as a random
# walk (Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019): sqrt(n)
# steps instead of the worst case n. Six deviations leave one false alarm in 5e8 elements.
SIGMAS = 6.0
FP32_UNIT = 2.0**-24  # half the distance from 1 to the next float32


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The codes of a packed tensor in their signed form, code - 2**(bits - 1).

    Args:
        words: int32 [rows, ceil(count*bits/32)]; each row is a stream of bits, lowest first, in
            which code i begins at bit i*bits and may reach into the next word.
        bits: width of a code, 2 to 8.
        count: codes of a row, which the packed shape only bounds.

    Returns:
        int8 [rows, count].
    """
    if 32 % bits == 0:
        return unpack_from_int32(words, bits, torch.Size((words.shape[0], count)))
    # The library leaves the bits at the end of a word unused where no whole code fits.
    first = torch.arange(count, device=words.device) * bits
    wide = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    pair = wide[:, first // 32] | (wide[:, first // 32 + 1] << 32)
    codes = (pair >> (first % 32)) & ((1 << bits) - 1)
    return (codes - (1 << (bits - 1))).to(torch.int8)


def codes_and_zeros(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, k: int, bits: int
) -> tuple[Tensor, Tensor]:
    """What a checkpoint's integers stand for, arguments as `dequantize` has them.

    Returns:
        signed codes [N, K] and zero points [N, G], float64.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if scale.ndim != 2 or scale.shape[1] == 0 or k % scale.shape[1]:
        raise ValueError(f"scale: expected [N, G] with G dividing K={k}, got {list(scale.shape)}")
    n, groups = scale.shape
    if weight.dtype is torch.int8:
        _check_shape("weight", weight, (n, k))
        codes = weight
    else:
        _check_shape("weight", weight, (n, -(-k * bits // 32)))
        codes = unpack(weight, bits, k)
    if zero_point is None:
        return codes.double(), torch.zeros(n, groups, dtype=torch.float64, device=scale.device)
    _check_shape("zero_point", zero_point, (-(-n * bits // 32), groups))
    return codes.double(), unpack(zero_point.t(), bits, n).t().double()


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, int]) -> None:
    if tensor.shape != expected:
        raise ValueError(f"{name}: expected {list(expected)}, got {list(tensor.shape)}")


def dequantize(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, k: int, bits: int = 4
) -> Tensor:
    """The real weights (code - zero_point) * scale.

    Args:
        weight: int32 [N, ceil(K*bits/32)], packed as `unpack` says, or int8 [N, K] of signed codes.
        scale: floating [N, G], one per row and group of K/G neighbours along K.
        zero_point: int32 [ceil(N*bits/32), G], packed in the same way along N; None means the
            signed code 0 everywhere.
        k: the input size K, which a packed shape only bounds.
        bits: width of a code, 2 to 8.

    Returns:
        float64 [N, K], exact: a 9-bit difference times a scale of at most 24 bits fits 53.

    Raises:
        ValueError: shapes that do not belong together.
    """
    codes, zeros = codes_and_zeros(weight, scale, zero_point, k, bits)
    group = k // scale.shape[1]
    zero, step = (t.repeat_interleave(group, dim=1) for t in (zeros, scale.double()))
    return (codes - zero) * step


def w4a16_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    bits: int = 4,
) -> Tensor:
    """x @ W.T + bias, W from `dequantize`: x floating [..., K], bias [N]; float64 [..., N]."""
    y = x.double() @ dequantize(weight, scale, zero_point, x.shape[-1], bits).T
    return y if bias is None else y + bias.double()


def w4a16_tolerance(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    bits: int = 4,
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
    codes, zeros = codes_and_zeros(weight, scale, zero_point, k, bits)
    groups = scale.shape[1]
    group = k // groups
    magnitude = codes.abs() + zeros.abs().repeat_interleave(group, dim=1)
    step = scale.double().abs().repeat_interleave(group, dim=1)
    absolute = x.double().abs() @ (magnitude * step).T
    if bias is not None:
        absolute = absolute + bias.double().abs()
    info = torch.finfo(x.dtype)
    y = w4a16_linear(x, weight, scale, zero_point, bias, bits)
    walk = SIGMAS * (group + groups + 4) ** 0.5 * FP32_UNIT * absolute
    # A subnormal output has a fixed step; the bf16 dot also flushes float32 subnormals to zero.
    flushed = k * 2.0 ** (bits - 1) * torch.finfo(torch.float32).smallest_normal
    smallest = info.smallest_normal * info.eps + flushed
    return info.eps / 2 * y.abs() + walk * (1 + info.eps) + smallest


def w8a16_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    bits: int = 8,
) -> Tensor:
    """`w4a16_linear` with the other default width: what the two ops mean is the same."""
    return w4a16_linear(x, weight, scale, zero_point, bias, bits)


def w8a16_tolerance(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    bits: int = 8,
) -> Tensor:
    """`w4a16_tolerance` with the other default width: the two kernels sum in the same order."""
    return w4a16_tolerance(x, weight, scale, zero_point, bias, bits)
