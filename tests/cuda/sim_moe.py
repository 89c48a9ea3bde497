# SPDX-License-Identifier: Apache-2.0
"""Routed experts on the simulator: packing, and the launch of a layer."""

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from c_structs import SCHEMES, Activation, ExpertWeights, Moe
from cuda_device import DTYPES, Device, Packed, Place
from moe_cases import Call, MoeLayer
from torch import Tensor

from vllm_plugin_tm.kernels import moe_activation
from vllm_plugin_tm.kernels.reference_moe import Experts

PLAIN = Place()
# turbo::kActivationNames
ACTIVATIONS = (
    *("swiglu", "swiglustep", "situ", "gelu", "gelu_tanh", "silu_no_mul"),
    *("gelu_no_mul", "gelu_tanh_no_mul", "relu2_no_mul"),
)


@dataclass(frozen=True)
class PackedLayer:
    """Both products' weights for all experts, one expert after another, and biases in the order of
    packed channels."""

    w13: Packed
    w2: Packed
    w13_bias: Tensor | None
    w2_bias: Tensor | None


def pack_layer(sim: Device, layer: MoeLayer) -> PackedLayer:
    """A layer in the device's layout."""
    gated = layer.activation.gated
    w13, w2 = (
        _pack(sim, weights, k, gate_up, 8 if layer.op == "w8a8" else 4)
        for weights, k, gate_up in (
            (layer.w13, layer.hidden, gated),
            (layer.w2, layer.intermediate, False),
        )
    )
    return PackedLayer(
        w13, w2, _bias(layer.w13.bias, w13, gated), _bias(layer.w2.bias, w2, gate_up=False)
    )


def _pack(sim: Device, weights: Experts, k: int, gate_up: bool, width: int) -> Packed:
    parts = [
        sim.pack(codes, scale, zero_point, k, weights.bits, width, gate_up)
        for codes, scale, zero_point, _ in map(weights.arguments, range(weights.codes.shape[0]))
    ]
    zeros = [part.zero for part in parts if part.zero is not None]
    return Packed(
        parts[0].layout,
        torch.cat([part.weight for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat(zeros) if zeros else None,
    )


def _bias(bias: Tensor | None, packed: Packed, gate_up: bool) -> Tensor | None:
    """Biases [E, N] as float32 [E, padded n]; NaN for channels that no weight has."""
    if bias is None:
        return None
    wide = -(-packed.layout.n // 64) * 64
    out = torch.full((bias.shape[0], wide), float("nan"), device="cpu")
    for n in range(bias.shape[1]):
        half, at = divmod(n, bias.shape[1] // 2) if gate_up else (0, n)
        tile = 2 * (at // 16) + half if gate_up else at // 16
        out[:, 16 * tile + at % 16] = bias[:, n].float()
    return out


@contextmanager
def _weights(
    sim: Device, name: str, packed: Packed, bias: Tensor | None
) -> Iterator[ExpertWeights]:
    with (
        sim.array(name, packed.weight) as weight,
        sim.array(f"{name}_scale", packed.scale) as scale,
        sim.array(f"{name}_zero", packed.zero) as zero,
        sim.array(f"{name}_bias", bias) as bias_at,
    ):
        yield ExpertWeights(packed.layout, weight, scale, zero, bias_at)


@dataclass(frozen=True)
class Routed:
    """What a launch takes beside a layer's weights: x [T, H], the routing, what the layer is."""

    x: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    intermediate: int
    activation: moe_activation.Activation
    expert_map: Tensor | None = None


def run(
    sim: Device,
    call: Call,
    packed: PackedLayer | None = None,
    tile: int | None = None,
    place: Place = PLAIN,
) -> Tensor:
    """y [T, H] of a layer on its activations and routing."""
    layer = call.layer
    routing = (call.x, call.topk_weights, call.topk_ids)
    routed = Routed(*routing, layer.intermediate, layer.activation, layer.expert_map)
    return launch(sim, layer.op, packed or pack_layer(sim, layer), routed, tile, place)


def launch(
    sim: Device,
    scheme: str,
    packed: PackedLayer,
    call: Routed,
    tile: int | None = None,
    place: Place = PLAIN,
) -> Tensor:
    """y [T, H] of experts whose packed weights are here."""
    (tokens, top_k), (_, hidden) = call.topk_ids.shape, call.x.shape
    weights, map_ = packed.w13.layout, call.expert_map
    # One expert after another, each as long as the layout says.
    experts = packed.w13.weight.numel() // (
        -(-weights.n // 64) * -(-weights.k // 64) * 64 * 64 * weights.bits // 32
    )
    a = call.activation
    with ExitStack() as stack:
        enter = stack.enter_context
        args = Moe(
            SCHEMES.index(scheme),
            DTYPES[call.x.dtype],
            DTYPES[packed.w13.scale.dtype],
            *(tokens, top_k, experts, experts if map_ is None else len(map_)),
            *(hidden, call.intermediate),
            enter(sim.rows(call.x, place)),
            hidden + place.pad,
            enter(_weights(sim, "w13", packed.w13, packed.w13_bias)),
            enter(_weights(sim, "w2", packed.w2, packed.w2_bias)),
            Activation(ACTIVATIONS.index(a.name), a.alpha, a.beta, a.limit),
            enter(sim.array("topk_weights", call.topk_weights)),
            enter(sim.array("topk_ids", call.topk_ids)),
            call.topk_ids.dtype == torch.int64,
            enter(sim.array("expert_map", map_)),
        )
        y = enter(sim.array("y", call.x.numel() * 2))
        assert y is not None
        args.y = y
        if tile is None:
            tile = sim.plan_moe_tile(args)
        room = sim.library.tm_cuda_moe_bytes(ctypes.byref(args), tile)
        args.memory = enter(sim.array("memory", room))
        sim.call("tm_cuda_moe", ctypes.byref(args), tile, None)
        return sim.read(y, tokens, hidden, dtype=call.x.dtype)
