# SPDX-License-Identifier: Apache-2.0
"""Routed experts with int8 weights, a scale for each channel, and int8 activations per token."""

from typing import Any

from vllm_plugin_tm.quantization.activations import text
from vllm_plugin_tm.quantization.compressed_tensors.compressed_tensors_moe import (
    TMCompressedTensorsExperts,
)
from vllm_plugin_tm.quantization.experts_kernel import Names
from vllm_plugin_tm.quantization.experts_method import moe_request
from vllm_plugin_tm.quantization.support_matrix import MoeRequest


class TMW8A8Int8Experts(TMCompressedTensorsExperts):
    """Mixed in before CompressedTensorsW8A8Int8MoEMethod."""

    names = Names("weight", "weight_scale")

    def _request(self, weight_quant: Any, input_quant: Any, moe: Any) -> MoeRequest | str:
        kinds = (text(weight_quant.strategy), text(input_quant.strategy))
        if kinds != ("channel", "token") or input_quant.dynamic is not True:
            return (
                f"weights per {kinds[0]} with activations per {kinds[1]}, dynamic="
                f"{input_quant.dynamic}: supported are channel, token, True"
            )
        if not (weight_quant.symmetric and input_quant.symmetric):
            return "zero points of weights or activations of experts are not supported"
        return moe_request(moe, "w8a8", "int8", False, None)

    def _adopt(self, weight_quant: Any, moe: Any) -> None:
        self.static_input_scales = False
