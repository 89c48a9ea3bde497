# SPDX-License-Identifier: Apache-2.0
"""Weights that are floats of 8 or 4 bits as loaders leave them: brought to what the packer takes,
validated, not unpacked."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_plugin_tm.quantization import grouped_int
from vllm_plugin_tm.quantization.support_matrix import CHANNEL

E4M3 = torch.float8_e4m3fn
_SIZE_BITS = 0x7F  # of an e4m3 byte; all set, it is not a number
_E8M0_NAN = 0xFF


def block_group(k: int, block_k: int) -> int:
    """The group size, along K, of weights in blocks of `block_k` inputs whose last may be shorter:
    groups are of one size, so it divides both; CHANNEL for a single block."""
    return CHANNEL if k <= block_k else math.gcd(k, block_k)


def block_scales(
    layer: str, name: str, scale: Tensor, n: int, k: int, block: Sequence[int]
) -> Tensor:
    """One scale of each block [ceil(N/bn), ceil(K/bk)] as float32 [N, G], one for each output row
    and group of block_group(). Raises ValueError naming layer and tensor."""
    rows, columns = block
    expected = (-(-n // rows), -(-k // columns))
    if tuple(scale.shape) != expected:
        raise ValueError(
            f"{layer}.{name}: expected shape {expected}, a scale for each block of {tuple(block)} "
            f"weights of {(n, k)}, found {tuple(scale.shape)}"
        )
    scale = scale.float()
    grouped_int.check_finite(layer, name, scale)
    group = block_group(k, columns)
    if group != CHANNEL:
        scale = scale.repeat_interleave(columns // group, dim=1)[:, : k // group]
    return scale.repeat_interleave(rows, dim=0)[:n].contiguous()


def channel_scales(layer: str, name: str, scale: Tensor, n: int, parts: Sequence[int]) -> Tensor:
    """One scale for all, for each of the fused parts, or for each channel, as float32 [N, 1].
    Raises ValueError naming layer and tensor."""
    if scale.dim() > 2 or scale.numel() not in (1, len(parts), n) or sum(parts) != n:
        raise ValueError(
            f"{layer}.{name}: expected 1, {len(parts)} or {n} scales for output sizes "
            f"{tuple(parts)}, found shape {tuple(scale.shape)}"
        )
    scale = scale.float().reshape(-1, 1)
    grouped_int.check_finite(layer, name, scale)
    if scale.shape[0] == n:
        return scale.contiguous()
    if scale.shape[0] == 1:
        return scale.repeat(n, 1)
    return scale.repeat_interleave(torch.tensor(parts, device=scale.device), dim=0)


def one_scale(layer: str, name: str, scale: Tensor | None) -> Tensor:
    """The static scale of activations, float32 [1]; of several, for parts that were calibrated
    apart, the largest, which clips none of them. Raises ValueError naming layer and tensor."""
    if scale is None or scale.numel() == 0:
        raise ValueError(f"{layer}.{name}: the layer has no such tensor")
    scale = scale.float().reshape(-1)
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"{layer}.{name}: expected positive finite scales, found {scale.tolist()}")
    return scale.max().reshape(1)


def e4m3_bytes(layer: str, name: str, weight: Tensor, n: int, k: int) -> Tensor:
    """float8_e4m3fn [N, K] as the packer's int8 [N, K]. Raises ValueError naming layer and tensor
    for another shape or dtype, and for codes that are not a number."""
    grouped_int.check(layer, name, weight, (n, k), E4M3)
    codes = weight.contiguous().view(torch.int8)
    _refuse_nan(layer, name, codes.view(torch.uint8) & _SIZE_BITS, _SIZE_BITS)
    return codes


def e2m1_words(layer: str, name: str, weight: Tensor, n: int, k: int) -> Tensor:
    """uint8 [N, K/2], e2m1 with even k in the low half, as the packer's int32 [N, K/8]: it takes
    integers as code + 8, so that their 0 is 8, and e2m1's 0 is 0. Raises ValueError naming layer
    and tensor for another shape or dtype."""
    grouped_int.check(layer, name, weight, (n, k // 2), torch.uint8)
    return weight.contiguous().view(torch.int32) ^ -0x77777778


def byte_scales(layer: str, name: str, scale: Tensor, n: int, groups: int, kind: str) -> Tensor:
    """The bytes of scales [N, G] of `kind` "e8m0" or "e4m3", uint8. Raises ValueError naming layer
    and tensor for another shape or dtype, and for a scale that is not a number."""
    if scale.dtype in (torch.float8_e8m0fnu, E4M3):
        found = "e8m0" if scale.dtype == torch.float8_e8m0fnu else "e4m3"
        if found != kind:
            raise ValueError(f"{layer}.{name}: expected scales of {kind}, found {found}")
        scale = scale.view(torch.uint8)
    grouped_int.check(layer, name, scale, (n, groups), torch.uint8)
    scale = scale.contiguous()
    if kind == "e8m0":
        _refuse_nan(layer, name, scale, _E8M0_NAN)
    else:
        _refuse_nan(layer, name, scale & _SIZE_BITS, _SIZE_BITS)
    return scale


def _refuse_nan(layer: str, name: str, codes: Tensor, nan: int) -> None:
    bad = codes == nan
    if bool(bad.any()):
        row, column = (int(index) for index in bad.nonzero()[0])
        raise ValueError(
            f"{layer}.{name}: {int(bad.sum())} of {codes.numel()} codes are not a number, the "
            f"first at output row {row}, column {column}; the checkpoint is damaged"
        )
