# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N999  (the file is named as upstream names its scheme)
"""Linear layers of packed weights of 2 to 8 bits: vLLM's mixed-precision kernel interface here, our
ops there."""

import torch
from torch import Tensor
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig

from vllm_plugin_tm import envs, machine, selftest
from vllm_plugin_tm.quantization import activations, grouped_int
from vllm_plugin_tm.quantization.kernel import put
from vllm_plugin_tm.quantization.linear_kernel import (
    WEIGHT_SUM,
    TMLinearKernel,
    layer_name,
    part_sizes,
)
from vllm_plugin_tm.quantization.support_matrix import (
    WEIGHT_TYPES,
    Request,
    Verdict,
    check,
    normalize_group_size,
    scheme_of,
)


class TMWNA16LinearKernel(TMLinearKernel, MPLinearKernel):
    """Packed integer weights, 16- or 32-bit activations, for every scheme that vLLM sends through
    `choose_mp_linear_kernel`: compressed-tensors, GPTQ, AWQ, Quark.

    Activations are kept, or rounded to int8 where the checkpoint asks for it or the user does: see
    `activations.plan`, whose decision is the only thing kept here beside the configuration.
    """

    weight_types = tuple(name for name, kind in WEIGHT_TYPES.items() if kind.packed)
    """vLLM's names of the weight types that this class reads."""

    @classmethod
    def get_min_capability(cls) -> int:
        """Any: the support matrix knows GPUs, and a CPU has no CUDA capability."""
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """(True, None), or (False, the reason with value and limit)."""
        verdict = cls._verdict(request_of(c))
        return verdict.ok, verdict.reason

    @classmethod
    def _verdict(cls, request: Request) -> Verdict:
        if request.weight_type not in cls.weight_types:
            return Verdict(
                False,
                f"weight type ({request.weight_type}) not supported, "
                f"supported are {cls.weight_types}",
            )
        verdict = check(request, machine.detect(), envs.schemes())
        problem = selftest.gpu_failure(str(scheme_of(request.weight_type))) if verdict.ok else None
        return Verdict(False, problem) if problem else verdict

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
        request = request_of(c)
        self.plan = activations.Plan(activations.kept(request))  # until the layer is known
        # A kernel that computes wrongly here must never see a weight.
        selftest.require(str(scheme_of(request.weight_type)))

    @property
    def group_size(self) -> int:
        """Weights that share a scale, CHANNEL for all of an output channel."""
        return normalize_group_size(self.config.group_size, self.config.partition_weight_shape[0])

    @property
    def note(self) -> str:
        """What became of the activations, where that is not what the scheme's name says."""
        return self.plan.note

    def disk_tensors(self, layer: torch.nn.Module) -> tuple[str, ...]:
        """Codes, scales and zero points. Schemes that pack codes of a byte each after loading have
        them in `weight`."""
        codes = self.w_q_name if getattr(layer, self.w_q_name, None) is not None else "weight"
        zeros = (self.w_zp_name,) if self.config.zero_points and self.w_zp_name else ()
        return (codes, self.w_s_name, *zeros)

    def output_size(self, layer: torch.nn.Module) -> int:
        """Output rows of this shard of the layer."""
        return self.config.partition_weight_shape[1]

    def settle_dummy(self, layer: torch.nn.Module) -> None:
        """Nothing: any bits are packed codes."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Validates the layer's disk tensors and replaces them by their kernel layout.

        Raises ValueError naming layer and tensor for whatever does not fit the configuration.
        """
        request = request_of(self.config)
        self.plan = activations.plan(request, machine.detect(), activations.asked_of(layer))
        selftest.require(self.plan.product)
        expected = grouped_int.Expected(
            layer=layer_name(layer),
            n=request.n,
            k=request.k,
            bits=WEIGHT_TYPES[request.weight_type].bits,
            group_size=request.group_size,
            dtype=self.config.act_type,
            asymmetric=request.zero_points,
            parts=part_sizes(layer),
        )
        self._pack(layer, self._read(layer, expected), expected)

    def _read(
        self, layer: torch.nn.Module, expected: grouped_int.Expected
    ) -> grouped_int.GroupedInt:
        return grouped_int.read_packed(
            layer, expected, self.w_q_name, self.w_s_name, self.w_zp_name
        )

    def _pack(
        self, layer: torch.nn.Module, disk: grouped_int.GroupedInt, expected: grouped_int.Expected
    ) -> None:
        ops = torch.ops.vllm_plugin_tm
        if self.plan.product == "w8a8":
            codes = grouped_int.signed_bytes(disk.codes, expected.k)
            weight, scale, sums = ops.w8a8_pack(codes, disk.scale.float())
            put(layer, WEIGHT_SUM, sums)
        else:
            pack = ops.w8a16_pack if self.plan.product == "w8a16" else ops.w4a16_pack
            weight, scale, zero_point = pack(
                disk.codes, disk.scale, disk.zero_point, expected.k, expected.bits
            )
            if expected.asymmetric and self.w_zp_name is not None:
                put(layer, self.w_zp_name, zero_point)
        put(layer, self.w_q_name, weight)
        put(layer, self.w_s_name, scale)
        symmetric = self.w_zp_name is not None and not expected.asymmetric
        if symmetric and getattr(layer, str(self.w_zp_name), None) is not None:
            # Symmetric GPTQ checkpoints carry zero points that are the middle code everywhere.
            setattr(layer, str(self.w_zp_name), None)

    def apply_weights(
        self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """x [..., K] times the layer's weights plus bias [N], in x's dtype: [..., N]."""
        # Depends on the configuration only: nothing here may depend on x (see torch.compile).
        ops = torch.ops.vllm_plugin_tm
        n = self.config.partition_weight_shape[1]
        weight, scale = getattr(layer, self.w_q_name), getattr(layer, self.w_s_name)
        if self.plan.product == "w8a8":
            return ops.w8a8_linear(x, weight, scale, getattr(layer, WEIGHT_SUM), bias, n)
        asymmetric = self.config.zero_points and self.w_zp_name is not None
        zero_point = getattr(layer, str(self.w_zp_name)) if asymmetric else None
        arguments = (x, weight, scale, zero_point, bias, n, self.group_size)
        if self.plan.product == "w4a8":
            return ops.w4a8_linear(*arguments, self.plan.x_groups)
        return (ops.w8a16_linear if self.plan.product == "w8a16" else ops.w4a16_linear)(*arguments)


def request_of(c: MPLinearLayerConfig) -> Request:
    """vLLM's layer configuration in the support matrix's words."""
    k, n = c.partition_weight_shape
    full_k, full_n = c.full_weight_shape
    return Request(
        weight_type=str(c.weight_type),
        zero_points=bool(c.zero_points),
        group_size=c.group_size,
        act_dtype=str(c.act_type).removeprefix("torch."),
        k=k,
        n=n,
        full_k=full_k,
        full_n=full_n,
        act_order=bool(getattr(c, "has_g_idx", False)),  # vLLM before 0.30
    )
