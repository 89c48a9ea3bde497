# SPDX-License-Identifier: Apache-2.0
"""vLLM's own CPU kernels for routed experts as peers, each prepared and called as the class that
vLLM would choose does it."""

from typing import Any

import torch
from torch import Tensor

from vllm_plugin_tm.bench.cases import UPSTREAM, UPSTREAM_BF16, Format
from vllm_plugin_tm.bench.moe_peers import Apply, MoePeer
from vllm_plugin_tm.bench.moe_weights import MoeWeights, Routed
from vllm_plugin_tm.bench.peers import Rounding, UnavailableError
from vllm_plugin_tm.bench.weights import Weights, repeated, tensor_bytes

SCHEMES = ("w4a16", "w8a8")
"""Those of `upstream`."""
_MULTIPLE = 32  # of both sizes; the classes of other schemes look, that of W4A16 does not


def may_run(form: Format) -> bool:
    """Whether `upstream` has a kernel for a format here, if vLLM is installed."""
    return form.scheme in SCHEMES and form.symmetric and torch.cpu._is_amx_tile_supported()


def upstream(weights: MoeWeights, llc_bytes: int) -> MoePeer:
    """vLLM's `fused_experts_cpu`, which computes W8A8 and W4A16 on AMX. Both round activations to
    8-bit integers in their own way, W4A16 without being asked.

    Raises:
        UnavailableError: vLLM is missing, or has no such experts for this processor or layer.
    """
    form, layer = weights.format, weights.layer
    what = f"{UPSTREAM}: experts of {form.facts.title}"
    if form.scheme not in SCHEMES or not form.symmetric:
        raise UnavailableError(
            f"{what}: of vLLM's experts symmetric {' and '.join(SCHEMES)} are measured"
        )
    if form.dtype != "bf16":
        raise UnavailableError(f"{what}: measured with activations in bf16 only")
    if layer.hidden % _MULTIPLE or layer.intermediate % _MULTIPLE:
        raise UnavailableError(
            f"{what}: {layer.model}: expected sizes that are multiples of {_MULTIPLE}, given "
            f"{layer.hidden} and {layer.intermediate}"
        )
    try:
        from vllm import _custom_ops
        from vllm.model_executor.layers.fused_moe.experts import cpu_moe
    except ImportError as error:
        raise UnavailableError(f"{what}: vLLM's op cannot be imported: {error}") from error
    kind: Any = cpu_moe.CPUExpertsInt4 if form.facts.grouped else cpu_moe.CPUExpertsInt8
    if not kind._supports_current_device():
        raise UnavailableError(f"{what}: vLLM's kernel needs AMX")

    def packed() -> tuple[Tensor | None, ...]:
        """Weights, scales and zero points as `fused_experts_cpu` takes them."""
        products = [
            (
                p.codes.view(layer.experts, -1, p.codes.shape[1]),
                p.scale.view(layer.experts, -1, p.scale.shape[1]),
            )
            for p in (weights.w13, weights.w2)
        ]
        if form.facts.grouped:
            first_k = [t.transpose(1, 2).contiguous() for pair in products for t in pair]
            w13, s13, w2, s2 = first_k
            w13, w2, s13, s2, z13, z2 = cpu_moe.prepare_int4_moe_layer_for_cpu(w13, w2, s13, s2)
            return w13, w2, s13, s2, z13, z2
        (w13, s13), (w2, s2) = products
        convert = torch.ops._C.convert_weight_packed
        return convert(w13), convert(w2), s13, s2, None, None

    methods = _custom_ops.CPUQuantMethod
    method = methods.INT4_W4A8 if form.facts.grouped else methods.INT8_W8A8
    unused = (None,) * 5  # blocks, biases, alpha, limit
    compute: Any = _custom_ops.fused_experts_cpu

    def apply(copy: tuple[Tensor | None, ...]) -> Apply:
        w13, w2, *rest = copy

        def fused(call: Routed) -> Tensor:
            y = torch.empty_like(call.x)
            routing = (call.topk_weights, call.topk_ids)
            compute(y, call.x, w13, w2, *routing, method, *rest, *unused)
            return y

        return fused

    first = packed()
    size = sum(tensor_bytes(t) for t in first)

    def twin() -> tuple[Tensor | None, ...]:
        return tuple(None if t is None else t.clone() for t in first)

    copies = [first, *repeated(twin, size, llc_bytes)]
    applies = tuple(apply(copy) for copy in copies)
    per_expert = size / layer.experts
    return MoePeer(UPSTREAM, "", weights, per_expert, applies, Rounding.OWN, rounds_between=True)


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
