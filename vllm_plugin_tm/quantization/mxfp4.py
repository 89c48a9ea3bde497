# SPDX-License-Identifier: Apache-2.0
"""Routed experts of MXFP4 checkpoints as gpt-oss has them, activations kept."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import Mxfp4MoeBackend

from vllm_plugin_tm.quantization.experts_kernel import Names
from vllm_plugin_tm.quantization.experts_method import TMExpertsMethod, moe_request
from vllm_plugin_tm.quantization.float_experts_kernel import FloatFormat

_GROUP = 32


class TMGptOssExperts(TMExpertsMethod):
    """Mixed in before GptOssMxfp4MoEMethod: gate and up rows alternate, there are biases."""

    names = Names("weight", "weight_scale")

    def __init__(self, moe: Any) -> None:
        self.form = FloatFormat(group=_GROUP, interleaved=str(moe.activation.value) == "swigluoai")
        upstream: Callable[[], None] = super().__init__
        wanted = moe_request(moe, "fp4", "mxfp4", False, _GROUP)
        # Upstream fills both sizes up to whole groups, with zeros.
        whole = {
            size: -(-getattr(wanted, size) // _GROUP) * _GROUP
            for size in ("hidden", "intermediate")
        }
        if self._begin(moe, replace(wanted, **whole), lambda: upstream(moe)):  # type: ignore[call-arg]
            self.weight_dtype = "gpt_oss_mxfp4"
            self.mxfp4_backend = Mxfp4MoeBackend.CPU
            self.max_capture_size = moe.max_capture_size
            self._cache_permute_indices: dict[torch.Size, torch.Tensor] = {}
            self.moe_kernel = None
            self.w13_precision_config = self.w2_precision_config = None
