# SPDX-License-Identifier: Apache-2.0
"""Seeded layers of the ops whose weights are floats, with the interface of linear_cases.Layer."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_plugin_tm.kernels import reference_float

# The op's first part, and what it does with activations, or what its scales are.
FP8 = ("fp8", "fp8_token", "fp8_tensor", "fp8_group")
FP4 = ("fp4_mx", "fp4_nv")

X_SCALE = 0.0061  # 3 % of normal values are beyond 448 of it


def pack_floats(
    op: str, weight: Tensor, scale: Tensor, k: int, gate_up: bool = False
) -> tuple[Tensor, Tensor]:
    """Weight and scale, as a FloatLayer of fp8 or fp4 has them, in the kernel layout."""
    namespace = torch.ops.vllm_plugin_tm
    if op == "fp8":
        packed = namespace.w8a16_pack(weight.view(torch.int8), scale, None, k, gate_up=gate_up)
    else:
        # The packer takes integers as code + 8, so that 0 is the code 8; e2m1's 0 is 0.
        words = weight.view(torch.int32) ^ -0x77777778
        packed = namespace.w4a16_pack(words, scale, None, k, gate_up=gate_up)
    return packed[0], packed[1]


def rounding_of(mode: str) -> str:
    """What the op does with activations in a mode of FP8."""
    return mode.partition("_")[2] or "none"


def scale_type_of(mode: str) -> str:
    """What the scales are in a mode of FP4."""
    return "e8m0" if mode == "fp4_mx" else "e4m3"


@dataclass(frozen=True)
class FloatLayer:
    """A layer as a checkpoint holds it: weight float8_e4m3fn [N, K] with scale float32 [N, G], or
    uint8 [N, K/2] of e2m1 pairs with the bytes of scales uint8 [N, G]; channel_scale float32 [N].
    """

    mode: str
    n: int
    k: int
    group_size: int
    weight: Tensor
    scale: Tensor
    channel_scale: Tensor | None = None
    bias: Tensor | None = None
    x_scale: Tensor | None = None
    x_group_size: int = -1

    @property
    def op(self) -> str:
        """The first part of the ops' names."""
        return self.mode.partition("_")[0]

    @functools.cached_property
    def packed(self) -> tuple[Tensor, Tensor]:
        """Weight and scale in the kernel layout."""
        return pack_floats(self.op, self.weight, self.scale, self.k)

    @functools.cached_property
    def _padded_channel_scale(self) -> Tensor | None:
        if self.channel_scale is None:
            return None
        return torch.nn.functional.pad(self.channel_scale, (0, -self.n % 16))

    @property
    def _rounding(self) -> str:
        return rounding_of(self.mode)

    @property
    def _scale_type(self) -> str:
        return scale_type_of(self.mode)

    def arguments(self, x: Tensor) -> dict[str, Any]:
        """The op's arguments by name, in order."""
        weight, scale = self.packed
        arguments = {"x": x, "weight": weight, "scale": scale}
        shape = {"bias": self.bias, "n": self.n, "group_size": self.group_size}
        if self.op == "fp8":
            more = {"x_scale": self.x_scale, "x_group_size": self.x_group_size}
            return arguments | shape | {"x_rounding": self._rounding} | more
        return (
            arguments
            | {"channel_scale": self._padded_channel_scale}
            | shape
            | {"scale_type": self._scale_type}
        )

    @property
    def linear(self) -> Any:
        """The op under test."""
        return getattr(torch.ops.vllm_plugin_tm, f"{self.op}_linear")

    def real_weight(self) -> Tensor:
        """The weights that the oracle sees, float64 [N, K]."""
        if self.op == "fp8":
            return reference_float.dequantize_fp8(self.weight, self.scale)
        scales = (self.scale, self._scale_type, self.channel_scale)
        return reference_float.dequantize_fp4(self.weight, *scales)

    def times(self, factor: float, dtype: torch.dtype) -> "FloatLayer":
        """The layer with all weights times `factor`; scales have their own dtype."""
        if self.op == "fp8":
            return dataclasses.replace(self, scale=self.scale * factor)
        channels = torch.ones(self.n) if self.channel_scale is None else self.channel_scale
        return dataclasses.replace(self, channel_scale=channels * factor)

    def with_scale(self, value: float) -> "FloatLayer":
        """The layer with this value for all scales."""
        if self.op == "fp8":
            return dataclasses.replace(self, scale=torch.full_like(self.scale, value))
        one = torch.full_like(self.scale, 127 if self._scale_type == "e8m0" else 0x38)
        return dataclasses.replace(self, scale=one, channel_scale=torch.full((self.n,), value))

    def __call__(self, x: Tensor) -> Tensor:
        """The op on x [..., K]."""
        return self.linear(*self.arguments(x).values())

    def oracle(self, x: Tensor, scale_factor: float = 1.0) -> tuple[Tensor, Tensor]:
        """What the oracle says and how far from it a right kernel may be; with a factor, what it
        says when all weights are larger."""
        if self.op == "fp8":
            scale = self.scale.double() * scale_factor
            arguments = (x, self.weight, scale, self.bias, self._rounding, self.x_scale)
            more: tuple[Any, ...] = (self.x_group_size,)
        else:
            channels = torch.ones(self.n) if self.channel_scale is None else self.channel_scale
            arguments = (x, self.weight, self.scale, channels.double() * scale_factor, self.bias)
            more = (self._scale_type,)
        return (
            getattr(reference_float, f"{self.op}_linear")(*arguments, *more),
            getattr(reference_float, f"{self.op}_tolerance")(*arguments, *more),
        )


def make_float_layer(
    mode: str, n: int, k: int, group_size: int, dtype: torch.dtype, bias: bool, seed: int
) -> FloatLayer:
    """A random layer whose outputs are about 1 for x about 1, of all codes but NaN: subnormal and
    negative zeros too. From 8 channels on, channel 3 has one zero scale (e8m0 has none: its
    smallest), and channel 6 is all zero."""
    generator = torch.Generator().manual_seed(seed * 1000003 + n * 1009 + k)
    groups = 1 if group_size == -1 else k // group_size

    def numbers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int64).to(
            torch.uint8
        )

    channel_scale = None
    if mode in FP8:
        codes = numbers(0, 254, n, k)
        # All but 0x7F and 0xFF, the NaNs. The root mean square of the rest is 110.
        weight = torch.where(codes >= 0x7F, codes + 1, codes).view(torch.float8_e4m3fn)
        sign = torch.randint(0, 2, (n, groups), generator=generator) * 2.0 - 1
        scale = sign * (0.5 + torch.rand(n, groups, generator=generator)) / (110 * k**0.5)
    else:
        weight = numbers(0, 256, n, k // 2)
        # The root mean square of e2m1 is 2.9.
        if mode == "fp4_mx":
            low = 125 - round(k.bit_length() / 2)
            scale = numbers(low, low + 3, n, groups)
        else:
            scale = numbers(0x30, 0x48, n, groups)  # 0.5 to 3.75
            channel_scale = (0.5 + torch.rand(n, generator=generator)) / (6 * k**0.5)
    if n >= 8:
        scale[3, 0] = 0
        weight.view(torch.uint8)[6] = 0
    return FloatLayer(
        mode,
        n,
        k,
        group_size,
        weight,
        scale,
        channel_scale,
        (0.25 * torch.randn(n, generator=generator)).to(dtype) if bias else None,
        torch.tensor([X_SCALE]) if mode == "fp8_tensor" else None,
    )
