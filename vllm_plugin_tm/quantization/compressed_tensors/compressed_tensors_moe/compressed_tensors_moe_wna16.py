# SPDX-License-Identifier: Apache-2.0
"""Routed experts with packed weights of 2 to 8 bits, activations kept."""

from fractions import Fraction
from typing import Any

from vllm_plugin_tm.quantization.compressed_tensors.compressed_tensors_moe import (
    TMCompressedTensorsExperts,
)
from vllm_plugin_tm.quantization.experts_kernel import Names
from vllm_plugin_tm.quantization.experts_method import moe_request
from vllm_plugin_tm.quantization.support_matrix import WORD_BITS, MoeRequest


class TMWNA16Experts(TMCompressedTensorsExperts):
    """Mixed in before CompressedTensorsWNA16MoEMethod."""

    names = Names("weight_packed", "weight_scale", "weight_zero_point")

    def _request(self, weight_quant: Any, input_quant: Any, moe: Any) -> MoeRequest | str:
        bits, symmetric = int(weight_quant.num_bits), bool(weight_quant.symmetric)
        weight_type = f"uint{bits}b{1 << (bits - 1)}" if symmetric else f"uint{bits}"
        scheme = "w4a16" if bits <= 4 else "w8a16"
        group = weight_quant.group_size
        return moe_request(moe, scheme, weight_type, not symmetric, group)

    def _adopt(self, weight_quant: Any, moe: Any) -> None:
        self.symmetric, self.num_bits = weight_quant.symmetric, weight_quant.num_bits
        self.packed_factor = Fraction(WORD_BITS, self.num_bits)
        self.strategy = weight_quant.strategy
        self.group_size = -1 if weight_quant.group_size is None else weight_quant.group_size
