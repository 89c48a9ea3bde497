# SPDX-License-Identifier: Apache-2.0
"""Routed experts with 4-bit weights, a byte each on disk, and int8 activations per token."""

from typing import Any

from vllm_plugin_tm.quantization.compressed_tensors.compressed_tensors_moe import (
    TMCompressedTensorsExperts,
)
from vllm_plugin_tm.quantization.experts_kernel import Names
from vllm_plugin_tm.quantization.experts_method import moe_request
from vllm_plugin_tm.quantization.support_matrix import MoeRequest


class TMW4A8Int8Experts(TMCompressedTensorsExperts):
    """Mixed in before CompressedTensorsW4A8Int8MoEMethod."""

    names = Names("weight", "weight_scale")

    def _request(self, weight_quant: Any, input_quant: Any, moe: Any) -> MoeRequest | str:
        if not (weight_quant.symmetric and input_quant.symmetric):
            return "zero points of weights or activations of experts are not supported"
        return moe_request(moe, "w4a8", "int4", False, weight_quant.group_size)

    def _adopt(self, weight_quant: Any, moe: Any) -> None:
        self.has_bias = moe.has_bias
        self.static_input_scales = False
        self.group_size = -1 if weight_quant.group_size is None else weight_quant.group_size
