# SPDX-License-Identifier: Apache-2.0
"""Routed experts of ModelOpt's FP8 and NVFP4 checkpoints. Its linear layers reach our kernels
through upstream's lists of them."""

from typing import Any

from vllm_plugin_tm.quantization.experts_kernel import Names
from vllm_plugin_tm.quantization.experts_method import TMExpertsMethod, moe_request
from vllm_plugin_tm.quantization.float_experts_kernel import FloatFormat
from vllm_plugin_tm.quantization.fp8 import refuse_no_backend
from vllm_plugin_tm.quantization.support_matrix import MoeRequest

_NAMES = Names("weight", "weight_scale")


class TMModelOptFp8Experts(TMExpertsMethod):
    """Mixed in before ModelOptFp8MoEMethod: a scale for each matrix, static activations. Gates and
    ups keep their own scales, where upstream quantizes one of them again with the other's."""

    names = _NAMES

    def __init__(self, quant_config: Any, moe_config: Any) -> None:
        self.form = FloatFormat(rounding="tensor")

        def upstream() -> None:
            super(TMModelOptFp8Experts, self).__init__(quant_config, moe_config)  # type: ignore[call-arg]

        wanted = moe_request(moe_config, "fp8", "float8_e4m3fn", False, None)
        if self._begin(moe_config, wanted, upstream):
            self.quant_config = quant_config
        refuse_no_backend(self)


class TMModelOptNvFp4Experts(TMExpertsMethod):
    """Mixed in before ModelOptNvFp4FusedMoE; activations are kept. Gates and ups keep the second
    scales that the checkpoint has for them, where upstream takes the gates' for both."""

    names = _NAMES

    def __init__(self, quant_config: Any, moe_config: Any) -> None:
        self.form = FloatFormat(group=16, scale_type="e4m3", tensor_scale="weight_scale_2")

        def upstream() -> None:
            super(TMModelOptNvFp4Experts, self).__init__(quant_config, moe_config)  # type: ignore[call-arg]

        wanted: MoeRequest | str = moe_request(moe_config, "fp4", "nvfp4", False, 16)
        override = getattr(quant_config, "moe_activation_override", None)
        if override is not None:
            wanted = f"activations of experts as {override}: supported is none, they are kept"
        if self._begin(moe_config, wanted, upstream):
            self.quant_config = quant_config
            self.use_a16 = True
            self.per_token_activation = False
            self.use_global_sf = False
