# SPDX-License-Identifier: Apache-2.0
"""Routed experts with FP4 weights, activations kept: see compressed_tensors_w4a4_fp4 of schemes."""

from collections.abc import Callable
from typing import Any

from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import Mxfp4MoeBackend

from vllm_plugin_tm.quantization.experts_kernel import Names
from vllm_plugin_tm.quantization.experts_method import TMExpertsMethod, moe_request
from vllm_plugin_tm.quantization.float_experts_kernel import FloatFormat

_NAMES = Names("weight_packed", "weight_scale")


class TMMxFp4Experts(TMExpertsMethod):
    """Mixed in before CompressedTensorsW4A4Mxfp4MoEMethod."""

    names = _NAMES

    def __init__(self, moe: Any) -> None:
        self.form = FloatFormat(group=32)
        upstream: Callable[[], None] = super().__init__
        wanted = moe_request(moe, "fp4", "mxfp4", False, 32)
        if self._begin(moe, wanted, lambda: upstream(moe)):  # type: ignore[call-arg]
            self.group_size = 32
            self.mxfp4_backend = Mxfp4MoeBackend.NONE
            self.use_cutlass_mxfp4 = False


class TMNvFp4Experts(TMExpertsMethod):
    """Mixed in before CompressedTensorsW4A4Nvfp4MoEMethod. Gates and ups keep the scales that the
    checkpoint has for them, where upstream takes the gates' for both."""

    names = _NAMES

    def __init__(self, moe: Any, layer_name: str | None = None, use_a16: bool = False) -> None:
        self.form = FloatFormat(
            group=16, scale_type="e4m3", tensor_scale="weight_global_scale", divides=True
        )
        upstream: Callable[[], None] = super().__init__
        wanted = moe_request(moe, "fp4", "nvfp4", False, 16)
        if self._begin(moe, wanted, lambda: upstream(moe, layer_name, use_a16)):  # type: ignore[call-arg]
            self.group_size = 16
            self.use_a16 = use_a16
            self.use_global_sf = False
