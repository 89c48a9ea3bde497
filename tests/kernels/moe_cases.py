# SPDX-License-Identifier: Apache-2.0
"""Seeded layers of routed experts of every scheme, their packed form, and routings."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from float_cases import FP4, X_SCALE, FloatLayer, pack_floats, rounding_of, scale_type_of
from linear_cases import FLOATS, INTEGER, KEPT, OWN_KERNELS, Expected, make_layer, make_x
from torch import Tensor

from vllm_plugin_tm import envs
from vllm_plugin_tm.kernels import reference_moe
from vllm_plugin_tm.kernels.reference_moe import Activation, Experts

# An op, and whether w4a8 rounds activations by groups; the first part is that of the ops' names.
INTEGER_SCHEMES = ("w4a16", "w8a16", "w4a8", "w4a8_groups", "w8a8")
SCHEMES = INTEGER_SCHEMES + FLOATS
# Schemes whose products keep their activations.
KEPT_SCHEMES = (*KEPT, "fp8", *FP4)
# The schemes' own products decide where they need a run; test_moe_row_invariance.py asserts it.
ON_OWN_KERNELS = [(mode, isa) for mode in SCHEMES for isa in envs.ISAS if isa in OWN_KERNELS[mode]]

# swiglu as gpt-oss has it, and the other shapes that a model may ask for. Limits are met by a fifth
# of the values and not by most: where many are equal to the largest or to a third of it, their
# int8 codes +-127.5 and 42.5 are ties that either way is right for, and the oracle's bound is wide.
ACTIVATIONS = (
    Activation(),
    Activation("swiglu", 1.702, 1.0, 1.25),
    Activation("swiglustep", limit=1.5),
    Activation("situ", 0.7, 0.9),
    Activation("situ", 1.3, 0.0),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("silu_no_mul"),
    Activation("gelu_no_mul"),
    Activation("gelu_tanh_no_mul"),
    Activation("relu2_no_mul"),
)
TILE_N = 16
X_SCALES = (X_SCALE, 1.4 * X_SCALE)  # of the two products in fp8_tensor


@dataclass(frozen=True)
class MoeLayer:
    """E experts as a checkpoint holds them. x_group_size: how many neighbours of x have one scale
    in fp8_group, -1 for as many as of the weights."""

    mode: str
    hidden: int
    intermediate: int
    w13: Experts
    w2: Experts
    activation: Activation
    expert_map: Tensor | None = None
    x_group_size: int = -1

    @property
    def op(self) -> str:
        """The first part of the ops' names."""
        return self.mode.partition("_")[0]

    @property
    def experts(self) -> int:
        """Experts whose weights are here."""
        return self.w13.codes.shape[0]

    @property
    def third(self) -> str:
        """What the op takes beside weights and scales."""
        if self.mode in FLOATS:
            return "channel_scale"
        return "weight_sum" if self.op == "w8a8" else "zero_point"

    @functools.cached_property
    def packed(self) -> dict[str, Tensor | None]:
        """Weights, scales, zero points (w8a8: sums, floats: scales of channels) and biases in the
        kernel layout, by the op's names."""
        out: dict[str, Tensor | None] = {}
        for name, weights, k in (
            ("w13", self.w13, self.hidden),
            ("w2", self.w2, self.intermediate),
        ):
            gate_up = name == "w13" and self.activation.gated
            parts = [self._pack(weights, e, k, gate_up) for e in range(self.experts)]
            weight, scale, *third = (torch.stack(part) for part in zip(*parts, strict=True))
            channels = scale.shape[1]
            out |= {name: weight, f"{name}_scale": scale}
            out[f"{name}_{self.third}"] = (
                third[0] if third else self._channels(weights.channel_scale, channels, gate_up)
            )
            out[f"{name}_bias"] = self._channels(weights.bias, channels, gate_up)
        return out

    def _pack(self, w: Experts, e: int, k: int, gate_up: bool) -> tuple[Tensor, ...]:
        namespace = torch.ops.vllm_plugin_tm
        codes, scale, zero_point, _ = w.arguments(e)
        if self.mode in FLOATS:
            return pack_floats(self.op, codes, scale, k, gate_up)
        if self.op == "w8a8":
            return namespace.w8a8_pack(codes, scale, gate_up)
        pack = namespace.w8a16_pack if self.op == "w8a16" else namespace.w4a16_pack
        return pack(codes, scale, zero_point, k, w.bits, gate_up)[: 2 + (zero_point is not None)]

    def _channels(self, values: Tensor | None, channels: int, gate_up: bool) -> Tensor | None:
        """Values [E, N] as float32 [E, channels] in the order of the packed channels, one by
        one."""
        if values is None:
            return None
        out = torch.zeros(self.experts, channels)
        for n in range(values.shape[1]):
            half, at = divmod(n, values.shape[1] // 2) if gate_up else (0, n)
            tile = at // TILE_N * 2 + half if gate_up else at // TILE_N
            out[:, tile * TILE_N + at % TILE_N] = values[:, n].float()
        return out

    @property
    def rounding(self) -> dict[str, Any]:
        """What the oracle has to know of the mode."""
        if self.op == "fp8":
            return {"x_rounding": rounding_of(self.mode), "x_group_size": self.x_group_size}
        return {"x_groups": self.mode == "w4a8_groups"}

    def arguments(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> dict[str, Any]:
        """The op's arguments by name, in order."""
        names = [
            f"{w}{part}"
            for w in ("w13", "w2")
            for part in ("", "_scale", f"_{self.third}", "_bias")
        ]
        arguments: dict[str, Any] = {"x": x, "topk_weights": topk_weights, "topk_ids": topk_ids}
        arguments |= {name: self.packed[name] for name in names}
        a = self.activation
        arguments |= {"intermediate_size": self.intermediate, "activation": a.name}
        arguments |= {"alpha": a.alpha, "beta": a.beta, "limit": a.limit}
        arguments["expert_map"] = self.expert_map
        if self.op == "w4a8":
            arguments["x_groups"] = self.mode == "w4a8_groups"
        if self.op == "fp8":
            arguments |= {
                "x_rounding": rounding_of(self.mode),
                "w13_x_scale": self.w13.x_scale,
                "w2_x_scale": self.w2.x_scale,
                "x_group_size": self.x_group_size,
            }
        if self.op == "fp4":
            arguments["scale_type"] = self.w13.scale_type
        return arguments

    @property
    def moe(self) -> Any:
        """The op under test."""
        return getattr(torch.ops.vllm_plugin_tm, f"{self.op}_moe")

    def __call__(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        return self.moe(*self.arguments(x, topk_weights, topk_ids).values())


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer; groups are along H for w13 and along I for w2, -1 one for all of it. w8a8
    has no groups and takes any for -1."""

    experts: int = 5
    hidden: int = 96
    intermediate: int = 64
    group: int = 32


def make_moe(
    mode: str,
    shape: Shape,
    dtype: torch.dtype,
    activation: Activation = ACTIVATIONS[0],
    asymmetric: bool = False,
    bias: bool = False,
    seed: int = 0,
    bits: int | None = None,
    scale_dtype: torch.dtype | None = None,
    long_x_groups: bool = False,
) -> MoeLayer:
    """A random layer whose outputs are about 1 for x about 1; see linear_cases.make_layer, which
    makes each expert's two products. Scales of another dtype are for w4a8 only. In fp8_group two
    groups of weights may share a scale of x: the last one of an odd number has its own."""
    if mode not in INTEGER:
        scale_dtype = None
    long_x_groups = long_x_groups and mode == "fp8_group" and shape.group > 0

    def experts(n: int, k: int, first: int, x_scale: float) -> Experts:
        sizes = (n, k, shape.group, dtype, asymmetric, bias)
        parts = [
            make_layer(mode, *sizes, seed=seed + first + e, bits=bits, scale_dtype=scale_dtype)
            for e in range(shape.experts)
        ]

        def stacked(name: str) -> Tensor | None:
            values = [getattr(part, name) for part in parts]
            return None if values[0] is None else torch.stack(values)

        floats = isinstance(parts[0], FloatLayer)
        codes, scale = stacked("weight" if floats else "codes"), stacked("scale")
        channel_scale = stacked("channel_scale") if floats else None
        assert codes is not None
        assert scale is not None
        # Larger weights: a product of two small numbers is smaller still.
        if channel_scale is not None:
            channel_scale = channel_scale * 2
        else:
            scale = scale + 1 if mode == "fp4_mx" else scale * 2  # e8m0 is an exponent
        return Experts(
            codes,
            scale,
            None if floats else stacked("zero_point"),
            stacked("bias"),
            getattr(parts[0], "bits", 0),
            channel_scale,
            scale_type_of(mode) if mode in FP4 else "",
            torch.tensor([x_scale]) if mode == "fp8_tensor" else None,
        )

    halves = 2 if activation.gated else 1
    return MoeLayer(
        mode,
        shape.hidden,
        shape.intermediate,
        experts(halves * shape.intermediate, shape.hidden, 0, X_SCALES[0]),
        experts(shape.hidden, shape.intermediate, 1000, X_SCALES[1]),
        activation,
        x_group_size=2 * shape.group if long_x_groups else -1,
    )


def times(weights: Experts, factor: float, dtype: torch.dtype | None = None) -> Experts:
    """All weights times `factor`, which those scales take that are not bytes; in their own dtype
    or, for the oracle, another one."""
    if weights.scale.dtype is not torch.uint8:
        scale = weights.scale.to(dtype or weights.scale.dtype)
        return replace(weights, scale=scale * factor)
    channels = weights.channel_scale
    if channels is None:
        channels = torch.ones(weights.codes.shape[:2])
    return replace(weights, channel_scale=channels.to(dtype or channels.dtype) * factor)


def random_routing(
    tokens: int, experts: int, top_k: int, seed: int = 3, kind: str = "spread"
) -> tuple[Tensor, Tensor]:
    """Weights float32 and ids int32, [T, top_k].

    "spread": any experts, no token one twice; "one": all tokens choose the same ones; "few": most
    experts get no token; "absent": some choices are -1, but the first is not.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    if kind == "one":
        scores[:, -top_k:] += 1
    if kind == "few":
        scores[:, : max(top_k, experts // 3)] += 1
    ids = scores.topk(top_k, dim=1).indices.to(torch.int32)
    if kind == "absent":
        ids.view(-1)[1:][torch.rand(ids.numel() - 1, generator=generator) < 0.3] = -1
    weights = torch.rand(tokens, top_k, generator=generator) + 0.1
    return weights, ids


@dataclass(frozen=True)
class Call:
    """A layer with activations and a routing."""

    layer: MoeLayer
    x: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    _cache: dict[tuple[float, float], Expected] = field(default_factory=dict, compare=False)

    def __call__(self) -> Tensor:
        return self.layer(self.x, self.topk_weights, self.topk_ids)

    def expected(self, w13: float = 1.0, w2: float = 1.0) -> Expected:
        """What the oracle says; with factors, what it says when a product's scales are larger."""
        if (w13, w2) not in self._cache:
            layer = self.layer
            products = (
                times(weights, factor, torch.float64)
                for weights, factor in ((layer.w13, w13), (layer.w2, w2))
            )
            arguments = (
                layer.op,
                self.x,
                self.topk_weights,
                self.topk_ids,
                *products,
                layer.activation,
                layer.expert_map,
            )
            self._cache[w13, w2] = Expected(
                reference_moe.moe(*arguments, **layer.rounding),
                reference_moe.moe_tolerance(*arguments, **layer.rounding),
            )
        return self._cache[w13, w2]


def make_call(
    layer: MoeLayer,
    tokens: int,
    top_k: int,
    dtype: torch.dtype,
    kind: str = "spread",
    view: Callable[[Tensor], Tensor] = lambda x: x,
) -> Call:
    """The layer on normal activations, as `view` puts them into memory."""
    routed = layer.experts if layer.expert_map is None else len(layer.expert_map)
    weights, ids = random_routing(tokens, routed, top_k, kind=kind)
    return Call(layer, view(make_x(tokens, layer.hidden, dtype)), weights, ids)
