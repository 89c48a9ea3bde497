# SPDX-License-Identifier: Apache-2.0
"""Who is measured on routed experts: our op, and upstream vLLM's for experts in bf16, both from the
same random checkpoint tensors and prepared as they are in service; and the gate before the clock.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from vllm_plugin_tm.bench import guard
from vllm_plugin_tm.bench.cases import OURS, UPSTREAM_BF16, Format
from vllm_plugin_tm.bench.moe_weights import MoeWeights, Routed
from vllm_plugin_tm.bench.peers import Kernel, Rounding, UnavailableError, our_rounding, pack
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


def upstream_bf16(weights: MoeWeights, llc_bytes: int) -> MoePeer:
    """Upstream's op for experts that are not quantized, on the dequantized weights in bf16: what
    runs on every processor upstream, and so what a user without the plugin would run.

    Raises:
        UnavailableError: vLLM or its op is missing, or does not take this layer.
    """
    name, form = UPSTREAM_BF16, weights.format
    if form.dtype != "bf16":
        raise UnavailableError(f"{name}: experts in bf16, so activations in bf16 only")
    try:
        from vllm import _custom_ops
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation
        from vllm.model_executor.layers.fused_moe.experts import cpu_moe
    except ImportError as error:
        raise UnavailableError(f"{name}: upstream's op cannot be imported: {error}") from error
    if not hasattr(torch.ops._C, "cpu_fused_moe"):
        raise UnavailableError(f"{name}: vLLM's library for this processor has no cpu_fused_moe")
    kind: Any = cpu_moe.CPUUnquantizedExperts
    if cpu_moe.X86CPUUnquantizedExperts._supports_current_device():
        kind = cpu_moe.X86CPUUnquantizedExperts
    layer = weights.layer
    if layer.hidden % kind.output_alignment or layer.intermediate % kind.output_alignment:
        raise UnavailableError(
            f"{name}: {layer.model}: expected sizes that are multiples of {kind.output_alignment}, "
            f"given {layer.hidden} and {layer.intermediate}"
        )

    def prepared(product: Weights) -> Tensor:
        experts = product.dequantized().view(layer.experts, -1, product.k)
        return _custom_ops.cpu_prepack_moe_weight(experts, kind.isa)

    def apply(w13: Tensor, w2: Tensor) -> Apply:
        def fused(call: Routed) -> Tensor:
            y = torch.empty_like(call.x)
            routing = (call.topk_weights, call.topk_ids)
            silu = MoEActivation.SILU.value
            _custom_ops.cpu_fused_moe(y, call.x, w13, w2, None, None, *routing, silu, kind.isa)
            return y

        return fused

    first = prepared(weights.w13), prepared(weights.w2)
    size = sum(tensor_bytes(t) for t in first)
    copies = [first, *repeated(lambda: (first[0].clone(), first[1].clone()), size, llc_bytes)]
    applies = tuple(apply(*copy) for copy in copies)
    return MoePeer(name, "", weights, size / layer.experts, applies, rounds_between=True)


def expected(weights: MoeWeights, checked: Routed, rounding: Rounding) -> Tensor:
    """The float64 result [1, H] that a kernel's should be near."""
    form = weights.format
    floats, rounds = form.facts.floats, rounding is Rounding.CHECKPOINT
    name = _op_name(form) if floats or rounds else f"w{form.facts.weight_bits}a16"
    return reference_moe.moe(
        name,
        checked.x,
        checked.topk_weights,
        checked.topk_ids,
        weights.as_reference(weights.w13),
        weights.as_reference(weights.w2),
        _ACTIVATION,
        x_rounding=floats.x_rounding if floats and rounds else "none",
    )


def check(peer: MoePeer, calls: tuple[Routed, ...], wanted: Tensor) -> float:
    """Compares the checked token of the first call, in its first and last row, with `wanted`: with
    the first weight copy, of few tokens the last too.

    Returns:
        The larger ||y - ref|| / ||ref||.

    Raises:
        guard.WrongResultError: it is above the bound, or not a number.
    """
    call, layer = calls[0], peer.weights.layer
    bound = guard.BOUND[call.x.dtype] * (_BETWEEN if peer.rounds_between else 1)
    what = f"{layer.model}, T={len(call.x)}, {peer.weights.format.name}"
    last = peer.applies[-1:] if len(call.x) <= guard.SMALL_BATCH else ()
    peer.select()
    worst = 0.0
    for apply in (peer.applies[0], *last):
        got = apply(call)[[0, -1]].double()
        error = guard.compare(peer.label, what, got, wanted.expand_as(got), bound)
        worst = max(worst, error)
    return worst
