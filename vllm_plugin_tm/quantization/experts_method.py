# SPDX-License-Identifier: Apache-2.0
"""What our subclasses of upstream's methods for routed experts share: take the layer or let
upstream have it, then send its weights and activations to a TMExpertsKernel."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from vllm_plugin_tm import envs, machine, selftest
from vllm_plugin_tm.kernels.moe_activation import Activation
from vllm_plugin_tm.quantization.activations import SMALLEST_INT8_GROUP
from vllm_plugin_tm.quantization.experts_kernel import Names, TMExpertsKernel
from vllm_plugin_tm.quantization.float_experts_kernel import FloatFormat, TMFloatExpertsKernel
from vllm_plugin_tm.quantization.support_matrix import (
    CHANNEL,
    WEIGHT_TYPES,
    MoeRequest,
    check_moe,
)

# What gpt-oss's activation, and that of Step models, have written into their ops upstream.
_SWIGLUOAI = Activation("swiglu", alpha=1.702, beta=1.0, limit=7.0)
_SWIGLUSTEP = Activation("swiglustep", limit=7.0)


class TMExpertsMethod:
    """Mixed in before the live upstream class, whose constructor chooses a backend and refuses when
    there is none: it is passed over where the layer is ours. Where it is not, everything is
    upstream's, and its refusal carries our reason too.
    """

    kernel: TMExpertsKernel | None = None
    note: str = ""
    """Why the layer is not ours, for the layer table."""

    per_token: bool = False
    """Whether the checkpoint asks for int8 activations per token; set before _begin()."""

    names: Names
    form: FloatFormat | None = None
    """How the checkpoint holds weights that are floats; set before _begin()."""

    def _begin(self, moe: Any, wanted: MoeRequest | str, upstream: Callable[[], None]) -> bool:
        """Constructs for `wanted`, or, where that is no request but why there is none, and where
        the support matrix says no, calls `upstream`. Returns whether the layer is ours.
        """
        reason = wanted if isinstance(wanted, str) else _refusal(wanted)
        if reason is not None:
            self.note = reason
            try:
                upstream()
            except (NotImplementedError, ValueError) as error:
                raise type(error)(f"{error} (vllm-plugin-tm: {reason})") from error
            return False
        assert isinstance(wanted, MoeRequest)
        FusedMoEMethodBase.__init__(self, moe)  # type: ignore[arg-type]
        if self.form is not None:
            activation = activation_of(moe)
            self.kernel = TMFloatExpertsKernel(wanted, activation, self.names, self.form)
            return True
        # Packed weights run as w4a8 because the checkpoint says so, per token, or because the user
        # wants it, by groups.
        packed = WEIGHT_TYPES[wanted.weight_type].packed
        x_groups = wanted.scheme == "w4a8" and packed and not self.per_token
        self.kernel = TMExpertsKernel(wanted, activation_of(moe), self.names, x_groups)
        return True

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Kernel layout, or upstream's."""
        if self.kernel is None:
            super().process_weights_after_loading(layer)  # type: ignore[misc]
        else:
            self.kernel.process(layer)

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> Any:
        """Upstream's; None where its kernels have nothing to do."""
        if self.kernel is None:
            return super().get_fused_moe_quant_config(layer)  # type: ignore[misc]
        return None

    def apply(
        self,
        layer: torch.nn.Module,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Any:
        """The routed experts on x [T, H]; shared ones are computed by upstream beside it."""
        if self.kernel is None:
            return super().apply(  # type: ignore[misc]
                layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input
            )
        return self.kernel.apply(layer, x, topk_weights, topk_ids)

    @property
    def is_monolithic(self) -> bool:
        """Whether the method chooses a token's experts itself. vLLM 0.28 has no router for CPUs."""
        if self.kernel is None:
            return super().is_monolithic  # type: ignore[misc]
        return machine.device() == "cpu" and not _has_cpu_router()

    def apply_monolithic(
        self,
        layer: Any,
        x: Tensor,
        router_logits: Tensor,
        input_ids: Tensor | None = None,
    ) -> Tensor:
        """Chooses the experts as vLLM 0.28's own CPU experts do, then computes them."""
        if self.kernel is None:
            return super().apply_monolithic(layer, x, router_logits, input_ids)  # type: ignore[misc]
        module = import_module("vllm.model_executor.layers.fused_moe.experts.cpu_moe")
        topk_weights, topk_ids = module.select_experts(
            hidden_states=x,
            router_logits=router_logits,
            top_k=layer.top_k,
            use_grouped_topk=layer.use_grouped_topk,
            renormalize=layer.renormalize,
            topk_group=layer.topk_group,
            num_expert_group=layer.num_expert_group,
            custom_routing_function=layer.custom_routing_function,
            scoring_func=layer.scoring_func,
            routed_scaling_factor=layer.routed_scaling_factor,
            e_score_correction_bias=layer.e_score_correction_bias,
        )
        return self.kernel.apply(layer, x, topk_weights, topk_ids)

    @property
    def supports_eplb(self) -> bool:
        """Experts that move between ranks would have to be packed again."""
        return False if self.kernel is not None else super().supports_eplb  # type: ignore[misc]


@cache
def _has_cpu_router() -> bool:
    return find_spec("vllm.model_executor.layers.fused_moe.router.cpu_router") is not None


def _refusal(wanted: MoeRequest) -> str | None:
    """Why a layer cannot be ours, or None."""
    reason = check_moe(wanted, machine.detect(), envs.schemes()).reason
    return reason or selftest.gpu_failure(f"{wanted.scheme}_moe")


def activation_of(moe: Any) -> Activation:
    """The ops' activation for upstream's FusedMoEConfig, whose activation the matrix knows."""
    limit = float("inf") if moe.swiglu_limit is None else float(moe.swiglu_limit)
    name = str(moe.activation.value)
    match name:
        case "silu":
            return Activation("swiglu", limit=limit)
        case "swigluoai":
            return _SWIGLUOAI
        case "swigluoai_uninterleave":
            alpha = 1.0 if moe.swiglu_alpha is None else float(moe.swiglu_alpha)
            beta = 0.0 if moe.swiglu_beta is None else float(moe.swiglu_beta)
            return Activation("swiglu", alpha, beta, limit)
        case "swiglustep":
            return _SWIGLUSTEP
        case "situ":
            linear = moe.activation_situ_linear_beta
            beta = 0.0 if linear is None else float(linear)
            return Activation("situ", float(moe.activation_situ_beta), beta)
    return Activation(name)


def moe_request(
    moe: Any, scheme: str, weight_type: str, zero_points: bool, group_size: int | None
) -> MoeRequest:
    """Upstream's FusedMoEConfig and a method's weights in the support matrix's words. Packed
    weights run as w4a8 where the user wants W4A16 layers to."""
    inner = moe.intermediate_size_per_partition
    group = CHANNEL if group_size is None else group_size
    long_groups = group == CHANNEL or group >= SMALLEST_INT8_GROUP
    rounded = envs.w4a16_int8_activations() and "w4a8" in envs.schemes()
    rounded = rounded and machine.device() == "cpu"  # kernels for GPUs do not round by groups
    if scheme == "w4a16" and long_groups and rounded:
        scheme = "w4a8"
    return MoeRequest(
        scheme=scheme,
        weight_type=weight_type,
        zero_points=zero_points,
        group_size=group,
        act_dtype=str(moe.in_dtype).removeprefix("torch."),
        hidden=moe.hidden_dim,
        intermediate=inner,
        full_intermediate=moe.intermediate_size,
        activation=str(moe.activation.value),
    )
