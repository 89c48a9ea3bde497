# SPDX-License-Identifier: Apache-2.0
"""Routed experts with FP8 weights and activations."""

from typing import Any

from vllm_plugin_tm.quantization.activations import text
from vllm_plugin_tm.quantization.compressed_tensors.compressed_tensors_moe import (
    TMCompressedTensorsExperts,
)
from vllm_plugin_tm.quantization.experts_kernel import Names
from vllm_plugin_tm.quantization.experts_method import moe_request
from vllm_plugin_tm.quantization.float_experts_kernel import FloatFormat
from vllm_plugin_tm.quantization.fp8 import X_GROUP_SIZE, refuse_no_backend
from vllm_plugin_tm.quantization.support_matrix import MoeRequest


class TMW8A8Fp8Experts(TMCompressedTensorsExperts):
    """Mixed in before CompressedTensorsW8A8Fp8MoEMethod."""

    names = Names("weight", "weight_scale")

    def __init__(
        self, weight_quant: Any, input_quant: Any, moe: Any, layer_name: str | None = None
    ) -> None:
        super().__init__(weight_quant, input_quant, moe, layer_name)
        refuse_no_backend(self)

    def _request(self, weight_quant: Any, input_quant: Any, moe: Any) -> MoeRequest | str:
        kind, static = text(weight_quant.strategy), input_quant.dynamic is False
        if static and kind != "tensor":
            return f"static activations with weights per {kind}: supported is tensor"
        block = tuple(weight_quant.block_structure or ())
        self.form = FloatFormat(
            blocks=(block,) if kind == "block" else (),
            rounding="tensor" if static else "group" if kind == "block" else "token",
            x_group_size=X_GROUP_SIZE if kind == "block" else -1,
        )
        return moe_request(moe, "fp8", "float8_e4m3fn", False, None)

    def _adopt(self, weight_quant: Any, moe: Any) -> None:
        block = text(weight_quant.strategy) == "block"
        self.weight_block_size = weight_quant.block_structure if block else None
        self.block_quant = block
        self.static_input_scales = self.input_quant.dynamic is False
