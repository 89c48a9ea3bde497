# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N999  (the file is named as upstream names its scheme)
"""W4A16 linear layers: vLLM's mixed-precision kernel interface here, our ops there."""

import torch
from torch import Tensor
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig
from vllm.model_executor.utils import replace_parameter

from vllm_plugin_tm import envs, machine, selftest
from vllm_plugin_tm.quantization import grouped_int4
from vllm_plugin_tm.quantization.support_matrix import Request, check, normalize_group_size


class TMW4A16LinearKernel(MPLinearKernel):
    """4-bit weights, 16- or 32-bit activations, for every scheme that vLLM sends through
    `choose_mp_linear_kernel`: compressed-tensors, GPTQ, AWQ, Quark.

    Keeps no tensor and no state beside its configuration: what the kernel needs is registered on
    the layer, under the names and with the shapes it had the time before, so that vLLM may reload
    weights and process them again.
    """

    @classmethod
    def get_min_capability(cls) -> int:
        """Any: a CPU has no CUDA capability."""
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """(True, None), or (False, the reason with value and limit)."""
        verdict = check(request_of(c), machine.detect(), envs.schemes())
        return verdict.ok, verdict.reason

    def __init__(
        self,
        c: MPLinearLayerConfig,
        w_q_param_name: str,
        w_s_param_name: str,
        w_zp_param_name: str | None = None,
        w_gidx_param_name: str | None = None,  # vLLM before 0.30 passes it; always unused by us
    ) -> None:
        ok, reason = self.can_implement(c)
        if not ok:
            raise ValueError(f"{type(self).__name__} cannot run this layer: {reason}")
        self.config = c
        self.w_q_name = w_q_param_name
        self.w_s_name = w_s_param_name
        self.w_zp_name = w_zp_param_name
        # A kernel that computes wrongly here must never see a weight.
        selftest.require("w4a16")

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Validates the layer's disk tensors and replaces them by their kernel layout.

        Raises ValueError naming layer and tensor for whatever does not fit the configuration.
        """
        k, n = self.config.partition_weight_shape
        expected = grouped_int4.Expected(
            layer=str(getattr(layer, "prefix", "") or type(layer).__name__),
            n=n,
            k=k,
            group_size=self.config.group_size,
            dtype=self.config.act_type,
            asymmetric=self.config.zero_points,
        )
        disk = grouped_int4.read(layer, expected, self.w_q_name, self.w_s_name, self.w_zp_name)
        weight, scale, zero_point = torch.ops.vllm_plugin_tm.w4a16_pack(
            disk.codes, disk.scale, disk.zero_point, k
        )
        # By position: the third parameter was renamed in vLLM 0.28.
        replace_parameter(layer, self.w_q_name, weight)
        replace_parameter(layer, self.w_s_name, scale)
        if self.w_zp_name is None:
            return
        if self.config.zero_points:
            replace_parameter(layer, self.w_zp_name, zero_point)
        elif getattr(layer, self.w_zp_name, None) is not None:
            # Symmetric GPTQ checkpoints carry zero points that say 8 everywhere.
            setattr(layer, self.w_zp_name, None)

    def apply_weights(
        self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """x [..., K] times the layer's weights plus bias [N], in x's dtype: [..., N]."""
        k, n = self.config.partition_weight_shape
        # Depends on the configuration only: nothing here may depend on x (see torch.compile).
        asymmetric = self.config.zero_points
        zero_point = getattr(layer, self.w_zp_name) if asymmetric and self.w_zp_name else None
        return torch.ops.vllm_plugin_tm.w4a16_linear(
            x,
            getattr(layer, self.w_q_name),
            getattr(layer, self.w_s_name),
            zero_point,
            bias,
            n,
            normalize_group_size(self.config.group_size, k),
        )


def request_of(c: MPLinearLayerConfig) -> Request:
    """vLLM's layer configuration in the support matrix's words."""
    k, n = c.partition_weight_shape
    return Request(
        weight_type=str(c.weight_type),
        zero_points=bool(c.zero_points),
        group_size=c.group_size,
        act_dtype=str(c.act_type).removeprefix("torch."),
        k=k,
        n=n,
        full_k=c.full_weight_shape[0],
        act_order=bool(getattr(c, "has_g_idx", False)),  # vLLM before 0.30
    )
