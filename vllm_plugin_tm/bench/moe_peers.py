# SPDX-License-Identifier: Apache-2.0
"""Who is measured on routed experts: our op here, vLLM's in moe_upstream.py, all from the same
random checkpoint tensors and prepared as they are in service; and the gate before the clock.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from vllm_plugin_tm.bench import guard
from vllm_plugin_tm.bench.cases import OURS, Format
from vllm_plugin_tm.bench.moe_weights import MoeWeights, Routed
from vllm_plugin_tm.bench.peers import Kernel, Rounding, our_rounding, pack
from vllm_plugin_tm.bench.timing import Step
from vllm_plugin_tm.bench.weights import Weights, repeated, tensor_bytes
from vllm_plugin_tm.kernels import ops, reference_moe

Apply = Callable[[Routed], Tensor]

_ACTIVATION = reference_moe.Activation()  # silu(gate) * up
# Four roundings more (weights, gates and ups, h, each expert's result) are errors that have nothing
# to do with each other: together about twice one of them.
_BETWEEN = 2


@dataclass(frozen=True)
class MoePeer(Kernel):
    """A kernel for all routed experts of a layer, with a rotating set of weight copies.

    `expert_bytes` are those of one expert as the kernel reads them; `applies[i](call)` computes
    with copy i. `rounds_between`: gates, ups and each expert's result are rounded to the
    activations' dtype too.
    """

    weights: MoeWeights
    expert_bytes: float
    applies: tuple[Apply, ...]
    rounding: Rounding = Rounding.NONE
    rounds_between: bool = False

    def read_once(self, call: Routed) -> None:
        """Computes with every copy; peers.Peer.read_once says why. `call` has enough tokens for
        nearly all experts."""
        self.select()
        for apply in self.applies:
            apply(call)

    def step(self, calls: tuple[Routed, ...]) -> Step:
        """A step for timing: every call uses the next copy and the next routing."""
        turns = zip(cycle(self.applies), cycle(calls), strict=False)  # both are endless

        def step() -> Tensor:
            apply, call = next(turns)
            return apply(call)

        return step


def ours(weights: MoeWeights, isa: str, llc_bytes: int) -> MoePeer:
    """Our op. Every copy is packed anew, so that it lies in memory as in service."""

    def packed() -> tuple[Tensor, ...]:
        return *_packed(weights, weights.w13, True), *_packed(weights, weights.w2, False)

    first = packed()
    size = sum(tensor_bytes(t) for t in first)
    copies = [first, *repeated(packed, size, llc_bytes)]
    applies = tuple(_experts(weights, copy) for copy in copies)
    rounding = our_rounding(weights.format)
    return MoePeer(OURS, isa, weights, size / weights.layer.experts, applies, rounding)


def _packed(weights: MoeWeights, product: Weights, gate_up: bool) -> tuple[Tensor, ...]:
    """Weight, scale and zero points (W8A8: sums), [experts, ...] each, one expert at a time."""
    experts = weights.layer.experts
    out: tuple[Tensor, ...] = ()
    for expert in range(experts):
        parts = pack(weights.expert(product, expert), gate_up)
        if not out:
            out = tuple(part.new_empty((experts, *part.shape)) for part in parts)
            for whole in out:
                torch.ops.vllm_plugin_tm.advise_huge_pages(whole)
        for part, whole in zip(parts, out, strict=True):
            whole[expert].copy_(part)
    return out


def _experts(weights: MoeWeights, packed: tuple[Tensor, ...]) -> Apply:
    """Our op of the weights' scheme with one packed copy."""
    ops.load()
    op: Callable[..., Tensor] = getattr(torch.ops.vllm_plugin_tm, f"{_op_name(weights.format)}_moe")
    facts = weights.format.facts
    # Without zero points W8A8 has a third tensor, the weights' sums, and so has NVFP4: scales.
    third = not facts.grouped or not weights.format.symmetric
    named: dict[str, Any] = {}
    if facts.floats:
        third = facts.floats.channel_scales
        named = {"scale_type": facts.floats.scale_type}
        if facts.floats.op == "fp8":
            named = {"x_rounding": facts.floats.x_rounding}
    products = [
        (weight, scale, zero if third else None, None)
        for weight, scale, zero in (packed[:3], packed[3:])
    ]
    a = _ACTIVATION
    rest = (weights.layer.intermediate, a.name, a.alpha, a.beta, a.limit)
    return lambda call: op(
        call.x, call.topk_weights, call.topk_ids, *products[0], *products[1], *rest, **named
    )


def _op_name(form: Format) -> str:
    """What our op is called, and its oracle."""
    return form.facts.floats.op if form.facts.floats else form.scheme


@dataclass(frozen=True)
class Expected:
    """The float64 result [1, H] that a kernel's should be near. Where a kernel rounds activations
    to 8-bit integers in its own way, `noise` is the relative distance, in norm, of the result with
    such activations."""

    result: Tensor
    noise: float = 0.0


def expected(
    weights: MoeWeights, checked: Routed, roundings: Iterable[Rounding]
) -> dict[Rounding, Expected]:
    """What a kernel of each rounding is compared with."""
    form = weights.format
    floats, bits = form.facts.floats, form.facts.weight_bits

    @cache
    def result(scheme: str, x_rounding: str = "none") -> Tensor:
        return reference_moe.moe(
            scheme,
            checked.x,
            checked.topk_weights,
            checked.topk_ids,
            weights.as_reference(weights.w13),
            weights.as_reference(weights.w2),
            _ACTIVATION,
            x_rounding=x_rounding,
        )

    def of(rounding: Rounding) -> Expected:
        if rounding is Rounding.CHECKPOINT:
            return Expected(result(_op_name(form), *([floats.x_rounding] if floats else [])))
        exact = result(_op_name(form) if floats else f"w{bits}a16")
        if rounding is Rounding.NONE:
            return Expected(exact)
        return Expected(exact, float((result(f"w{bits}a8") - exact).norm() / exact.norm()))

    return {rounding: of(rounding) for rounding in roundings}


def check(peer: MoePeer, calls: tuple[Routed, ...], wanted: Expected) -> float:
    """Compares the checked token of the first call, in its first and last row, with `wanted`: with
    the first weight copy, of few tokens the last too.

    Returns:
        The larger ||y - ref|| / ||ref||.

    Raises:
        guard.WrongResultError: it is above the bound, or not a number.
    """
    call, layer = calls[0], peer.weights.layer
    bound = guard.BOUND[call.x.dtype] * (_BETWEEN if peer.rounds_between else 1)
    bound = math.hypot(bound, guard.ROUNDING_ROOM * wanted.noise)
    what = f"{layer.model}, T={len(call.x)}, {peer.weights.format.name}"
    last = peer.applies[-1:] if len(call.x) <= guard.SMALL_BATCH else ()
    peer.select()
    worst = 0.0
    for apply in (peer.applies[0], *last):
        got = apply(call)[[0, -1]].double()
        error = guard.compare(peer.label, what, got, wanted.result.expand_as(got), bound)
        worst = max(worst, error)
    return worst
