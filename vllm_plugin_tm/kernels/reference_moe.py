# SPDX-License-Identifier: Apache-2.0
"""The oracle of the ops that run routed experts, in float64 on top of the linear oracles: one
expert after another, no sorting, no blocks. Calls no kernel."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_plugin_tm.kernels import moe_activation, reference, reference_float, reference_int8
from vllm_plugin_tm.kernels.reference import FP32_UNIT

# What the kernels' elementary functions may be off by, in float32 units in the last place: a few
# operations, an exponential, a division.
_FUNCTION_UNITS = 24


@dataclass(frozen=True)
class Activation(moe_activation.Activation):
    """With its meaning, in float64.

    swiglu: g' * sigmoid(alpha * g') * (u' + beta) with g' = min(g, limit), u' within +-limit.
    swiglustep: min(silu(g), limit) * u'. situ: alpha * tanh(g / alpha) * sigmoid(g) * u, u softly
    clipped to beta * tanh(u / beta) where beta > 0. gelu, gelu_tanh: gelu(g) * u. Names that end in
    _no_mul have no u: silu, gelu, gelu_tanh, relu2 (the square of what is positive).
    """

    def __call__(self, products: Tensor) -> Tensor:
        """float64 [..., 2 I] (gated: gates, then ups) or [..., I] to [..., I]."""
        g, u = products.chunk(2, dim=-1) if self.gated else (products, products)
        within = u.clamp(-self.limit, self.limit)
        gelu = torch.nn.functional.gelu
        match self.name.removesuffix("_no_mul"):
            case "swiglu":
                g = g.clamp(max=self.limit)
                return g * torch.sigmoid(self.alpha * g) * (within + self.beta)
            case "swiglustep":
                return (g * torch.sigmoid(g)).clamp(max=self.limit) * within
            case "situ":
                soft = self.beta * torch.tanh(u / self.beta) if self.beta > 0 else u
                return self.alpha * torch.tanh(g / self.alpha) * torch.sigmoid(g) * soft
            case "silu":
                value = g * torch.sigmoid(g)
            case "gelu":
                value = gelu(g)
            case "gelu_tanh":
                value = gelu(g, approximate="tanh")
            case "relu2":
                value = g.clamp(min=0) ** 2
            case _:
                raise ValueError(f"unknown activation {self.name!r}")
        return value * u if self.gated else value


@dataclass(frozen=True)
class Experts:
    """One product's weights for all experts, as a checkpoint holds them: `reference.dequantize`, or
    for floats `reference_float`, says what each [E, ...] entry is. Gated w13 has I gate rows, then
    I up rows. bias [E, N]; x_scale [1] is that of the product's activations where they have one."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    bias: Tensor | None = None
    bits: int = 4
    channel_scale: Tensor | None = None
    scale_type: str = "e8m0"
    x_scale: Tensor | None = None

    def arguments(self, expert: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Codes, scale, zero point and bias of one expert."""
        zero_point, bias = _of(self.zero_point, expert), _of(self.bias, expert)
        return self.codes[expert], self.scale[expert], zero_point, bias


@dataclass(frozen=True)
class _Scheme:
    """What both products have in common: the form of their weights, the rounding of their
    activations."""

    name: str
    x_groups: bool
    x_rounding: str
    x_group_size: int

    @property
    def keeps_activations(self) -> bool:
        if self.name.startswith("fp"):
            return self.x_rounding == "none"
        return self.name.endswith("a16")

    def matrix(self, experts: Experts, expert: int, k: int) -> Tensor:
        """One expert's real weights, float64 [N, K]."""
        codes, scale, zero_point, _ = experts.arguments(expert)
        if self.name == "fp8":
            return reference_float.dequantize_fp8(codes, scale)
        if self.name == "fp4":
            scales = (scale, experts.scale_type, _of(experts.channel_scale, expert))
            return reference_float.dequantize_fp4(codes, *scales)
        return reference.dequantize(codes, scale, zero_point, k, experts.bits)

    def product(self, x: Tensor, experts: Experts, expert: int) -> tuple[Tensor, Tensor]:
        """A product with one expert's weights, float64, and its tolerance in float32."""
        codes, scale, zero_point, bias = experts.arguments(expert)
        if self.name == "fp8":
            eight = (x, codes, scale, bias, self.x_rounding, experts.x_scale, self.x_group_size)
            return reference_float.fp8_linear(*eight), reference_float.fp8_tolerance(*eight)
        if self.name == "fp4":
            channels = _of(experts.channel_scale, expert)
            four = (x, codes, scale, channels, bias, experts.scale_type)
            return reference_float.fp4_linear(*four), reference_float.fp4_tolerance(*four)
        if self.keeps_activations:
            kept = (x, codes, scale, zero_point, bias, experts.bits)
            return reference.w4a16_linear(*kept), reference.w4a16_tolerance(*kept)
        if self.name == "w4a8":
            more = (x, codes, scale, zero_point, bias, self.x_groups, experts.bits)
            return reference_int8.w4a8_linear(*more), reference_int8.w4a8_tolerance(*more)
        return (
            reference_int8.w8a8_linear(x, codes, scale, bias),
            reference_int8.w8a8_tolerance(x, codes, scale, bias),
        )

    def moved(self, h: Tensor, off: Tensor, dtype: torch.dtype, w2: Experts) -> Tensor:
        """How far the rounded h may be from the oracle's rounding of it, float64."""
        if self.keeps_activations:
            return ((h + off).to(dtype).double() - (h - off).to(dtype).double()).abs()
        if self.name == "fp8":
            width = h.shape[-1] // w2.scale.shape[-1]
            group_size = width if self.x_group_size == -1 else self.x_group_size
            rounding = (self.x_rounding, w2.x_scale, group_size)
            return reference_float.rounded_x_tolerance(h, off, *rounding)
        groups = w2.scale.shape[-1] if self.x_groups else 1
        x = h.unflatten(-1, (groups, -1))
        off = off.unflatten(-1, (groups, -1))
        quantized = reference_int8.quantize_x(h.float(), groups=groups)
        scale = quantized.scale.double()
        # The scale moves with the largest value, and every quotient with it.
        largest = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        wide = off + x.abs() * (off.amax(-1, keepdim=True) / largest + 4 * FP32_UNIT)
        codes = [((x + d) / scale).clamp(-128, 127).round() for d in (wide, -wide)]
        scale_moved = x.abs() * (wide.amax(-1, keepdim=True) / largest)
        return ((codes[0] - codes[1]).abs() * scale + scale_moved).flatten(-2)


def _of(tensor: Tensor | None, expert: int) -> Tensor | None:
    return None if tensor is None else tensor[expert]


@dataclass(frozen=True)
class _Share:
    """What one expert adds to y for the tokens that chose it, and by how much that may be off."""

    tokens: Tensor
    y: Tensor
    tolerance: Tensor


def moe(
    scheme: str,
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w13: Experts,
    w2: Experts,
    activation: Activation,
    expert_map: Tensor | None = None,
    x_groups: bool = False,
    x_rounding: str = "none",
    x_group_size: int = -1,
) -> Tensor:
    """y [T, H] float64: for each token the sum over its experts of weight * down(h).

    `scheme` is "w4a16", "w8a16", "w4a8", "w8a8", "fp8" or "fp4"; x [T, H]; topk_weights and
    topk_ids [T, top_k]. An id -1, or one that expert_map [global experts] maps to -1, is an expert
    that is elsewhere. h = activation(first product) is rounded once: to x's dtype, or from float32
    to int8 as `reference_int8.quantize_x` does it, for fp8 to e4m3 as `reference_float.round_x`
    does it with x_rounding and x_group_size, -1 for the size of each product's own groups.
    """
    y = torch.zeros(x.shape, dtype=torch.float64)
    how = _Scheme(scheme, x_groups, x_rounding, x_group_size)
    for share in _shares(how, x, topk_weights, topk_ids, w13, w2, activation, expert_map):
        y.index_add_(0, share.tokens, share.y)
    return y


def moe_tolerance(
    scheme: str,
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w13: Experts,
    w2: Experts,
    activation: Activation,
    expert_map: Tensor | None = None,
    x_groups: bool = False,
    x_rounding: str = "none",
    x_group_size: int = -1,
) -> Tensor:
    """How far a right kernel may be from `moe`: same arguments, float64 [T, H].

    The first product may be off by the linear kernel's tolerance in float32, the activation by a
    few units more. Where that makes two roundings of h possible, either is right, and their
    distance goes through the second product. The sum over experts is float32; one rounding to x's
    dtype follows.
    """
    y, magnitude = torch.zeros(2, *x.shape, dtype=torch.float64)
    total = torch.zeros_like(y)
    how = _Scheme(scheme, x_groups, x_rounding, x_group_size)
    for share in _shares(how, x, topk_weights, topk_ids, w13, w2, activation, expert_map):
        y.index_add_(0, share.tokens, share.y)
        magnitude.index_add_(0, share.tokens, share.y.abs())
        total.index_add_(0, share.tokens, share.tolerance)
    info = torch.finfo(x.dtype)
    total += (topk_ids.shape[1] + 1) * FP32_UNIT * magnitude
    return info.eps / 2 * y.abs() + total * (1 + info.eps) + info.smallest_normal * info.eps


def _shares(
    scheme: _Scheme,
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w13: Experts,
    w2: Experts,
    activation: Activation,
    expert_map: Tensor | None,
) -> Iterator[_Share]:
    local = topk_ids.long()
    if expert_map is not None:
        local = torch.where(local < 0, local, expert_map.long()[local.clamp(min=0)])
    for expert in range(w13.codes.shape[0]):
        tokens, slots = (local == expert).nonzero(as_tuple=True)
        if len(tokens) == 0:
            continue
        # float32 holds every x exactly, and says that the product's result is float32.
        first, off = scheme.product(x[tokens].float(), w13, expert)
        exact, h_off = _activated(activation, first, off)
        h = exact.to(x.dtype if scheme.keeps_activations else torch.float32)
        y, tolerance = scheme.product(h.float(), w2, expert)
        matrix = scheme.matrix(w2, expert, h.shape[1]).abs()
        tolerance = tolerance + scheme.moved(exact, h_off, h.dtype, w2) @ matrix.T
        weight = topk_weights[tokens, slots].double().unsqueeze(1)
        yield _Share(tokens, weight * y, weight.abs() * tolerance)


def _activated(activation: Activation, products: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
    """h, and how far it may be off when the products are off by `off`."""
    h = activation(products)
    error = _FUNCTION_UNITS * FP32_UNIT * h.abs()
    parts = torch.arange(products.shape[1]) < h.shape[1]
    # The halves one by one, up and down: the functions are smooth at this distance.
    for which in (parts, ~parts):
        moved = torch.where(which, off, torch.zeros_like(off))
        error += torch.maximum(
            (activation(products + moved) - h).abs(), (activation(products - moved) - h).abs()
        )
    return h, error
