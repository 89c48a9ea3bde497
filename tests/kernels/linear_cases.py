# SPDX-License-Identifier: Apache-2.0
"""Seeded quantized layers of every op, their packed form, and the assertion that holds a result to
the oracle."""

import dataclasses
import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from float_cases import FP4, FP8, FloatLayer, make_float_layer
from torch import Tensor

from vllm_plugin_tm import envs
from vllm_plugin_tm.kernels import reference, reference_int8

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# An op and what it does with its activations; the first part is that of the ops' names.
KEPT = ("w4a16", "w8a16")
W4A8 = ("w4a8", "w4a8_groups")
W8A8 = ("w8a8", "w8a8_asym", "w8a8_static", "w8a8_static_asym")
FLOATS = FP8 + FP4
MODES = KEPT + W4A8 + W8A8 + FLOATS
WITHOUT_ZERO_POINTS = W8A8 + FLOATS  # of weights
INTEGER = W4A8 + W8A8

# Instruction sets that differ for activations that are kept, and for integers; the others share
# their kernels, which test_row_invariance.py asserts.
OWN_KERNELS = {
    **dict.fromkeys(KEPT, ("amx", "avx512bf16", "avx512", "avx2")),
    **dict.fromkeys(INTEGER, ("amx", "avx512vnni", "avx512", "avxvnni", "avx2")),
    **dict.fromkeys(FLOATS, ("amx", "avx512bf16", "avx512", "avx2")),
}
ON_OWN_KERNELS = [(mode, isa) for mode in MODES for isa in envs.ISAS if isa in OWN_KERNELS[mode]]

# What a static layer's activations are quantized with: 3 % of normal values are clamped.
X_SCALE, X_ZERO_POINT = 0.0173, -37


@dataclass(frozen=True)
class Layer:
    """A layer as a checkpoint holds it: codes packed, or int8; zero points packed.

    Group size -1 is channel; `bits` is the width of a code; x_scale float32 [1] and x_zero_point
    int32 [1] are those of static activations.
    """

    mode: str
    n: int
    k: int
    group_size: int
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    bias: Tensor | None = None
    bits: int = 4
    x_scale: Tensor | None = None
    x_zero_point: Tensor | None = None

    @property
    def op(self) -> str:
        """The first part of the ops' names."""
        return self.mode.partition("_")[0]

    @property
    def disk(self) -> tuple[Any, ...]:
        """The arguments of the packing op."""
        if self.op == "w8a8":
            return self.codes, self.scale
        return self.codes, self.scale, self.zero_point, self.k, self.bits

    @functools.cached_property
    def packed(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Weight, scale, and zero points (w8a8: sums of weights) in the kernel layout."""
        if self.op == "w8a8":
            return torch.ops.vllm_plugin_tm.w8a8_pack(*self.disk)
        # 4-bit weights have one layout, whatever becomes of the activations.
        name = "w8a16_pack" if self.op == "w8a16" else "w4a16_pack"
        weight, scale, zero = getattr(torch.ops.vllm_plugin_tm, name)(*self.disk)
        return weight, scale, zero if self.zero_point is not None else None

    def arguments(self, x: Tensor) -> dict[str, Any]:
        """The op's arguments by name, in order."""
        weight, scale, third = self.packed
        arguments = {"x": x, "weight": weight, "scale": scale}
        if self.op == "w8a8":
            return arguments | {
                "weight_sum": third,
                "bias": self.bias,
                "n": self.n,
                "x_scale": self.x_scale,
                "x_zero_point": self.x_zero_point,
                "x_symmetric": self.mode != "w8a8_asym",
            }
        arguments |= {"zero_point": third, "bias": self.bias, "n": self.n}
        arguments["group_size"] = self.group_size
        if self.op == "w4a8":
            arguments["x_groups"] = self.mode == "w4a8_groups"
        return arguments

    @property
    def linear(self) -> Any:
        """The op under test."""
        return getattr(torch.ops.vllm_plugin_tm, f"{self.op}_linear")

    def real_weight(self) -> Tensor:
        """The weights that the oracle sees, float64 [N, K]."""
        return reference.dequantize(self.codes, self.scale, self.zero_point, self.k, self.bits)

    def times(self, factor: float, dtype: torch.dtype) -> "Layer":
        """The layer with all scales times `factor`, in `dtype` where they have the activations'."""
        scale = self.scale * factor
        return dataclasses.replace(self, scale=scale if self.op == "w8a8" else scale.to(dtype))

    def with_scale(self, value: float) -> "Layer":
        """The layer with this value for all scales."""
        return dataclasses.replace(self, scale=torch.full_like(self.scale, value))

    def __call__(self, x: Tensor) -> Tensor:
        """The op on x [..., K]."""
        return self.linear(*self.arguments(x).values())


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Signed codes int8 [rows, columns] as rows of a stream of bits, lowest first: int32 [rows,
    ceil(columns * bits / 32)]. Plain on purpose: one bit at a time."""
    unsigned = codes.long() + 2 ** (bits - 1)
    stream = (unsigned.unsqueeze(-1) >> torch.arange(bits)) & 1
    stream = torch.nn.functional.pad(stream.flatten(1), (0, -codes.shape[1] * bits % 32))
    words = (stream.view(codes.shape[0], -1, 32) << torch.arange(32)).sum(-1)
    return words.to(torch.int32)


def make_layer(
    mode: str,
    n: int,
    k: int,
    group_size: int,
    dtype: torch.dtype,
    asymmetric: bool = False,
    bias: bool = False,
    seed: int = 0,
    bits: int | None = None,
    scale_dtype: torch.dtype | None = None,
) -> Layer | FloatLayer:
    """A random layer whose outputs are about 1 for x about 1.

    Scales have both signs. From 8 channels on, channel 3 has one zero scale, channel 5 one group
    that is all zero and channel 6 is all zero: legal input. Modes of w8a8 know channels only, no
    weight zero points, and float32 scales; `bits` is the op's own width unless given.
    Modes of FLOATS take what they have of these, see float_cases.
    """
    if mode in FLOATS:
        return make_float_layer(mode, n, k, group_size, dtype, bias, seed)
    generator = torch.Generator().manual_seed(seed * 1000003 + n * 1009 + k)
    w8a8 = mode in W8A8
    bits = bits or (8 if w8a8 or mode == "w8a16" else 4)
    if w8a8:
        group_size, asymmetric, scale_dtype = -1, False, torch.float32
    groups = 1 if group_size == -1 else k // group_size
    width, most = k // groups, 2 ** (bits - 1)

    def random_codes(columns: int) -> Tensor:
        return torch.randint(-most, most, (n, columns), generator=generator).to(torch.int8)

    codes, zeros = random_codes(k), random_codes(groups)
    if not asymmetric:
        zeros.zero_()
    sign = torch.randint(0, 2, (n, groups), generator=generator) * 2.0 - 1
    # Codes are spread evenly over 2 * most values, their differences to zero points wider.
    scale = sign * (0.5 + torch.rand(n, groups, generator=generator)) / (0.6 * most * k**0.5)
    if n >= 8:
        scale[3, 0] = 0
        codes[5, -width:] = zeros[5, -1]
        codes[6] = zeros[6].repeat_interleave(width)
    static = mode.startswith("w8a8_static")
    return Layer(
        mode,
        n,
        k,
        group_size,
        codes if w8a8 else pack_bits(codes, bits),
        scale.to(scale_dtype or dtype),
        pack_bits(zeros.t(), bits).t().contiguous() if asymmetric else None,
        (0.25 * torch.randn(n, generator=generator)).to(dtype) if bias else None,
        bits,
        torch.tensor([X_SCALE]) if static else None,
        torch.tensor([X_ZERO_POINT], dtype=torch.int32) if mode == "w8a8_static_asym" else None,
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


def expected(layer: Layer | FloatLayer, x: Tensor, scale_factor: float = 1.0) -> Expected:
    """What the oracle says of layer(x); with a factor, what it says when all scales are larger."""
    if isinstance(layer, FloatLayer):
        return Expected(*layer.oracle(x, scale_factor))
    scale = layer.scale.double() * scale_factor
    arguments: tuple[Any, ...]
    if layer.op == "w8a8":
        static = (layer.x_scale, layer.x_zero_point)
        arguments = (x, layer.codes, scale, layer.bias, *static, layer.mode != "w8a8_asym")
    else:
        arguments = (x, layer.codes, scale, layer.zero_point, layer.bias)
        if layer.op == "w4a8":
            arguments += (layer.mode == "w4a8_groups",)
        arguments += (layer.bits,)
    oracle = reference if layer.mode in KEPT else reference_int8
    return Expected(
        getattr(oracle, f"{layer.op}_linear")(*arguments),
        getattr(oracle, f"{layer.op}_tolerance")(*arguments),
    )


def assert_right(y: Tensor, want: Expected) -> None:
    """y is what the oracle says, per element and in norm.

    Per element the bound is the oracle's tolerance: half a unit in the last place, at most
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
        norm, bound = (float(e.norm()) for e in (error, 0.75 * want.allowed))
        assert norm <= bound, f"norm of the error: {norm:.3g} > {bound:.3g}"


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
