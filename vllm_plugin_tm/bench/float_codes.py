# SPDX-License-Identifier: Apache-2.0
"""Random weights of small floats as a checkpoint holds them, and their real values."""

import math

import torch
from torch import Tensor

from vllm_plugin_tm.bench.schemes import Floats
from vllm_plugin_tm.kernels import reference_float

_E4M3_MOST = reference_float.E4M3_MOST
_E4M3_SIGMA = _E4M3_MOST / 4.5  # of 4096 normal numbers the largest is about 4
_E8M0_ONE = 127
_E2M1_SIZE = (sum(v * v for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)) / 8) ** 0.5
_E4M3_SCALES = (0x72, 0x7F)
"""Bytes of 160 to 448: the upper end, where a checkpoint's global scale puts those of groups."""


def random(
    floats: Floats, n: int, k: int, group: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales of groups of `group` inputs, and of channels: as weights.Weights has them.

    Normal weights rounded to FP8, every code of FP4, and scales within a factor of three of each
    other; rows of y are about as large as rows of x.
    """

    def factors(*shape: int) -> Tensor:
        return 0.5 + torch.rand(*shape, generator=generator)

    def numbers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)

    groups = k // group
    if floats.op == "fp8":
        # As rounding normal weights to the range gives them: processors take longer for subnormal
        # numbers, of which even codes would have hundreds of times as many.
        weights = torch.randn(n, k, generator=generator).mul_(_E4M3_SIGMA)
        codes = weights.clamp_(-_E4M3_MOST, _E4M3_MOST).to(torch.float8_e4m3fn)
        values = codes[:8].float()
        rows = min(n, group) if floats.block else 1
        scale = factors(-(-n // rows), groups) / (_size(values) * k**0.5)
        scale = scale.repeat_interleave(rows, dim=0)[:n].contiguous()
        return codes, scale, None
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
