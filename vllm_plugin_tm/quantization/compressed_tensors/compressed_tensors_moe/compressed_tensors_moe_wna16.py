# SPDX-License-Identifier: Apache-2.0
"""Routed experts with packed weights of 2 to 8 bits, activations kept; and packed 4-bit ones with
int8 activations per token, for which upstream has no method."""

from fractions import Fraction
from importlib import import_module
from typing import Any

import torch

from vllm_plugin_tm import envs, machine
from vllm_plugin_tm.quantization.compressed_tensors.compressed_tensors_moe import (
    TMCompressedTensorsExperts,
)
from vllm_plugin_tm.quantization.experts_kernel import Names
from vllm_plugin_tm.quantization.experts_method import moe_request
from vllm_plugin_tm.quantization.support_matrix import WORD_BITS, MoeRequest, check_moe

_PACKED = "pack-quantized"
_METHOD = (
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe"
    ".compressed_tensors_moe_wna16",
    "CompressedTensorsWNA16MoEMethod",
)


def request_of(weight_quant: Any, input_quant: Any, moe: Any) -> MoeRequest:
    """compressed-tensors' arguments in the support matrix's words."""
    bits, symmetric = int(weight_quant.num_bits), bool(weight_quant.symmetric)
    weight_type = f"uint{bits}b{1 << (bits - 1)}" if symmetric else f"uint{bits}"
    kept = "w4a16" if bits <= 4 else "w8a16"
    scheme = kept if input_quant is None else "w4a8"
    return moe_request(moe, scheme, weight_type, not symmetric, weight_quant.group_size)


class TMWNA16Experts(TMCompressedTensorsExperts):
    """Mixed in before CompressedTensorsWNA16MoEMethod."""

    names = Names("weight_packed", "weight_scale", "weight_zero_point")
    moe: Any  # set by vLLM's base class

    def _request(self, weight_quant: Any, input_quant: Any, moe: Any) -> MoeRequest | str:
        if weight_quant.actorder == "group":  # vLLM from 0.30 on refuses it before
            return "activation order (g_idx) not supported, only groups of neighbours are"
        return request_of(weight_quant, input_quant, moe)

    def _adopt(self, weight_quant: Any, moe: Any) -> None:
        self.symmetric, self.num_bits = weight_quant.symmetric, weight_quant.num_bits
        self.packed_factor = Fraction(WORD_BITS, self.num_bits)
        self.strategy = weight_quant.strategy
        self.group_size = -1 if weight_quant.group_size is None else weight_quant.group_size
        # Read by vLLM up to 0.30, and by 0.28.
        self.is_transposed, self.actorder = False, weight_quant.actorder

    def get_weight_shape(
        self,
        weight_name: str,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        num_groups_w2: int | None = None,
        num_groups_w13: int | None = None,
    ) -> tuple[int, int, int]:
        """Shape of a checkpoint's tensor, [experts, N, K] in words or groups. vLLM up to 0.30 knows
        this order for symmetric weights only."""
        if self.kernel is None:
            sizes = (num_experts, hidden_size, intermediate_size_per_partition)
            both = (num_groups_w2, num_groups_w13)
            return super().get_weight_shape(weight_name, *sizes, *both)  # type: ignore[misc]
        product, _, part = weight_name.partition("_")
        gate_up = intermediate_size_per_partition * (2 if self.moe.is_act_and_mul else 1)
        n, k, groups = (
            (gate_up, hidden_size, num_groups_w13)
            if product == "w13"
            else (hidden_size, intermediate_size_per_partition, num_groups_w2)
        )
        if part == "weight":
            return num_experts, n, int(k // self.packed_factor)
        assert groups is not None
        return num_experts, n if part == "scale" else int(n // self.packed_factor), groups


class TMExpertsChoice:
    """Mixed in before CompressedTensorsMoEMethod where upstream asks it for a layer's method: the
    one that it has for 4-bit weights and int8 activations reads a byte for each weight."""

    @classmethod
    def get_moe_method(cls, quant_config: Any, layer: torch.nn.Module, layer_name: str) -> Any:
        """Upstream's choice, or, where packed weights are to meet int8 activations and we can run
        that, the method of packed weights."""
        # As upstream begins: schemes of "Linear" are those of experts too.
        quant_config._add_fused_moe_to_target_scheme_map()
        scheme = quant_config.get_scheme_dict(layer, f"{layer_name}.0.{layer.ckpt_gate_proj_name}")
        if scheme and scheme.get("format") == _PACKED:
            arguments = (scheme.get("weights"), scheme.get("input_activations"))
            # vLLM 0.28 and 0.30 answer only where both exist.
            rounded = None not in arguments and quant_config._is_dynamic_token_w4a8_int(*arguments)
            if rounded and arguments[1].symmetric:
                wanted = request_of(*arguments, layer.moe_config)
                if check_moe(wanted, machine.detect(), envs.schemes()).ok:
                    module, name = _METHOD
                    return getattr(import_module(module), name)(*arguments, layer.moe_config)
        return super().get_moe_method(quant_config, layer, layer_name)  # type: ignore[misc]
