# SPDX-License-Identifier: Apache-2.0
"""Routed experts of AWQ checkpoints. Their linear layers come through the mixed-precision list."""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.quantization import auto_awq

from vllm_plugin_tm.quantization.experts_kernel import Names
from vllm_plugin_tm.quantization.experts_method import TMExpertsMethod, moe_request

_BITS = 4


def standard_order(codes: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One expert's int32 [K, N/8] codes and [G, N/8] zero points, both in AWQ's order of nibbles,
    as [K/8, N] and [N/8, G]: by upstream's own function for linear layers."""
    layer = torch.nn.Module()
    layer.register_parameter("qweight", torch.nn.Parameter(codes, requires_grad=False))
    name = None
    if zero_point is not None:
        name = "qzeros"
        layer.register_parameter(name, torch.nn.Parameter(zero_point, requires_grad=False))
    auto_awq._convert_awq_to_standard_format(layer, "qweight", name, _BITS)
    zeros = None if name is None else layer.get_parameter(name).data
    return layer.get_parameter("qweight").data, zeros


class TMAWQExperts(TMExpertsMethod):
    """Mixed in before AutoAWQMoEMethod: codes packed along the output, zero points."""

    names = Names("qweight", "scales", "qzeros", k_first=True, reorder=standard_order)

    def __init__(self, quant_config: Any, moe: Any) -> None:
        def upstream() -> None:
            super(TMAWQExperts, self).__init__(quant_config, moe)  # type: ignore[call-arg]

        wanted = moe_request(
            moe,
            "w4a16",
            "uint4" if quant_config.zero_point else "uint4b8",
            bool(quant_config.zero_point),
            quant_config.group_size,
        )
        if self._begin(moe, wanted, upstream):
            self.quant_config = quant_config
            self.input_dtype = None
