# SPDX-License-Identifier: Apache-2.0
"""Seeded W4A16 layers, their packed form, and the assertion that holds a result to the oracle."""

import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor

from vllm_plugin_tm.kernels import reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Layer:
    """A W4A16 layer as a checkpoint holds it: codes and zero points packed. Group -1: channel."""

    n: int
    k: int
    group_size: int
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None

    @property
    def disk(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The arguments of the packing op and of the oracle."""
        return self.codes, self.scale, self.zero_point

    @functools.cached_property
    def packed(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """weight, scale and zero points in the kernel layout."""
        weight, scale, zero = torch.ops.vllm_plugin_tm.w4a16_pack(*self.disk, self.k)
        return weight, scale, zero if self.zero_point is not None else None

    def __call__(self, x: Tensor) -> Tensor:
        """The op under test on x [..., K]."""
        return torch.ops.vllm_plugin_tm.w4a16_linear(
            x, *self.packed, self.bias, self.n, self.group_size
        )


def make_layer(
    n: int,
    k: int,
    group_size: int,
    dtype: torch.dtype,
    asymmetric: bool = False,
    bias: bool = False,
    seed: int = 0,
) -> Layer:
    """A random layer whose outputs are about 1 for x about 1.

    Scales have both signs. From 8 channels on, channel 3 has one zero scale, channel 5 one group
    that is all zero and channel 6 is all zero: legal input.
    """
    generator = torch.Generator().manual_seed(seed * 1000003 + n * 1009 + k)
    groups = 1 if group_size == -1 else k // group_size
    width = k // groups
    codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    zeros = torch.randint(-8, 8, (n, groups), generator=generator, dtype=torch.int8)
    if not asymmetric:
        zeros.zero_()
    sign = torch.randint(0, 2, (n, groups), generator=generator) * 2.0 - 1
    scale = sign * (0.5 + torch.rand(n, groups, generator=generator)) / (5 * k**0.5)
    if n >= 8:
        scale[3, 0] = 0
        codes[5, -width:] = zeros[5, -1]
        codes[6] = zeros[6].repeat_interleave(width)
    return Layer(
        n,
        k,
        group_size,
        pack_to_int32(codes, 4),
        scale.to(dtype),
        pack_to_int32(zeros, 4, packed_dim=0).contiguous() if asymmetric else None,
        (0.25 * torch.randn(n, generator=generator)).to(dtype) if bias else None,
    )


def make_x(rows: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Normal activations [rows, K]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, k, generator=generator).to(dtype)


@dataclass(frozen=True)
class Expected:
    """The oracle's result and how far from it a right kernel may be, both float64 [..., N]."""

    y: Tensor
    allowed: Tensor


def expected(layer: Layer, x: Tensor, scale_factor: float = 1.0) -> Expected:
    """What the oracle says of layer(x); with a factor, what it says when all scales are larger."""
    arguments = (x, layer.codes, layer.scale.double() * scale_factor, layer.zero_point, layer.bias)
    return Expected(reference.w4a16_linear(*arguments), reference.w4a16_tolerance(*arguments))


def assert_right(y: Tensor, want: Expected) -> None:
    """y is what the oracle says, per element and in norm.

    Per element the bound is reference.w4a16_tolerance: half a unit in the last place, at most
    2**-8 = 0.4 % of the value for bf16, and float32 summation. In norm it is three quarters of the
    bound's norm, because rounding errors are spread evenly and so have 1/sqrt(3) of their bound in
    the square mean; that leaves no room for a bias. 1 % is outside of both, see the tests of it.
    """
    assert y.shape == want.y.shape
    assert y.is_contiguous()
    error = (y.double() - want.y).abs()
    outside = ~(error <= want.allowed)  # a NaN is outside
    if outside.any():
        at = tuple(int(i) for i in outside.nonzero()[0])
        raise AssertionError(
            f"{int(outside.sum())} of {y.numel()} elements are outside of the bound, the first at "
            f"{at}: got {y[at]}, expected {want.y[at]} +- {want.allowed[at]:.3g}"
        )
    if y.numel() >= 256:
        relative, bound = (float(e.norm() / want.y.norm()) for e in (error, 0.75 * want.allowed))
        assert relative <= bound, f"relative norm of the error: {relative:.3g} > {bound:.3g}"


def pairwise(**axes: Sequence[Any]) -> list[dict[str, Any]]:
    """Few combinations in which every pair of values of every two axes occurs; deterministic.

    Greedy: of 30 random candidates for each still missing pair, the one that covers most.
    """
    names = list(axes)
    shuffle = random.Random(0)
    missing = {
        (i, a, j, b)
        for i, j in itertools.combinations(range(len(names)), 2)
        for a in range(len(axes[names[i]]))
        for b in range(len(axes[names[j]]))
    }

    def covered(choice: Sequence[int]) -> set[tuple[int, int, int, int]]:
        pairs = itertools.combinations(enumerate(choice), 2)
        return {(i, a, j, b) for (i, a), (j, b) in pairs} & missing

    rows = []
    while missing:
        i, a, j, b = min(missing)
        candidates = []
        for _ in range(30):
            choice = [shuffle.randrange(len(axes[name])) for name in names]
            choice[i], choice[j] = a, b
            candidates.append(choice)
        best = max(candidates, key=lambda choice: len(covered(choice)))
        missing -= covered(best)
        rows.append({name: axes[name][at] for name, at in zip(names, best, strict=True)})
    return rows
