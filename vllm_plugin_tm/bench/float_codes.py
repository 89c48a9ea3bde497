# SPDX-License-Identifier: Apache-2.0
"""Random weights of small floats as a checkpoint holds them, and their real values."""

import math

import torch
from torch import Tensor

from vllm_plugin_tm.bench.schemes import Floats
from vllm_plugin_tm.kernels import reference_float

_NOT_A_NUMBER = 0x7F  # an e4m3 byte without its sign
_E8M0_ONE = 127
_E2M1_SIZE = (sum(v * v for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)) / 8) ** 0.5
_E4M3_SCALES = (0x72, 0x7F)
"""Bytes of 160 to 448: the upper end, where a checkpoint's global scale puts those of groups."""


def random(
    floats: Floats, n: int, k: int, group: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales of groups of `group` inputs, and of channels: as weights.Weights has them.

    Every code that is a number, and scales within a factor of three of each other; rows of y are
    about as large as rows of x.
    """

    def factors(*shape: int) -> Tensor:
        return 0.5 + torch.rand(*shape, generator=generator)

    def numbers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)

    groups = k // group
    if floats.op == "fp8":
        codes = numbers(0, 256, n, k)
        # The largest number instead, of either sign.
        codes -= ((codes & _NOT_A_NUMBER) == _NOT_A_NUMBER).byte()
        values = codes[:8].view(torch.float8_e4m3fn).float()
        rows = min(n, group) if floats.block else 1
        scale = factors(-(-n // rows), groups) / (_size(values) * k**0.5)
        scale = scale.repeat_interleave(rows, dim=0)[:n].contiguous()
        return codes.view(torch.float8_e4m3fn), scale, None
    codes = numbers(0, 256, n, k // 2)
    wanted = 1 / (_E2M1_SIZE * k**0.5)
    if not floats.channel_scales:
        exponent = round(math.log2(wanted))
        return codes, numbers(0, 2, n, groups) + (_E8M0_ONE + exponent), None
    scale = numbers(*_E4M3_SCALES, n, groups)
    size = _size(scale[:8].view(torch.float8_e4m3fn).float())
    return codes, scale, factors(n) * (wanted / size)


def exact(floats: Floats, codes: Tensor, scale: Tensor, channels: Tensor | None) -> Tensor:
    """The real weights, float64 [N, K]."""
    if floats.op == "fp8":
        return reference_float.dequantize_fp8(codes, scale)
    return reference_float.dequantize_fp4(codes, scale, floats.scale_type, channels)


def _size(values: Tensor) -> float:
    """The root of the mean square."""
    return float(values.square().mean().sqrt())
