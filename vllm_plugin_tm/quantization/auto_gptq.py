# SPDX-License-Identifier: Apache-2.0
"""GPTQ checkpoints: routed experts, and linear layers, whose kernel comes from the mixed-precision
list once upstream's constructor lets them through."""

from typing import Any

import torch

from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_wNa16 import (
    TMWNA16LinearKernel,
)
from vllm_plugin_tm.quantization.experts_kernel import Names
from vllm_plugin_tm.quantization.experts_method import TMExpertsMethod, moe_request


class TMGPTQLinear:
    """Mixed in before AutoGPTQLinearMethod. Upstream asks on every platform whether Marlin, which
    runs on GPUs, could run the layer: on a CPU no 8-bit layer and no group size but Marlin's would
    come as far as the list of kernels."""

    kernel: Any

    def __init__(self, quant_config: Any) -> None:
        self._refusal: ValueError | None = None
        try:
            super().__init__(quant_config)  # type: ignore[call-arg]
        except ValueError as error:
            self._refusal = error
            self.quant_config = quant_config
            self.quant_type = quant_config.quant_type
            self.input_dtype = None

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Upstream's, which chooses the kernel. Raises ValueError with upstream's words where
        upstream had refused and the kernel is not ours."""
        super().create_weights(  # type: ignore[misc]
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra_weight_attrs,
        )
        if self._refusal is not None and not isinstance(self.kernel, TMWNA16LinearKernel):
            raise self._refusal


class TMGPTQExperts(TMExpertsMethod):
    """Mixed in before AutoGPTQMoEMethod: codes and scales with the input first; symmetric."""

    names = Names("qweight", "scales", "qzeros", k_first=True)

    def __init__(self, quant_config: Any, moe: Any) -> None:
        def upstream() -> None:
            super(TMGPTQExperts, self).__init__(quant_config, moe)  # type: ignore[call-arg]

        bits = int(quant_config.quant_type.size_bits)
        scheme = "w4a16" if bits <= 4 else "w8a16"
        weight_type = str(quant_config.quant_type)
        wanted = moe_request(moe, scheme, weight_type, False, quant_config.group_size)
        if self._begin(moe, wanted, upstream):
            self.quant_config = quant_config
            # The class of vLLM's experts is read by vLLM up to 0.30.
            self.input_dtype = self.experts_cls = None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Biases that no checkpoint tensor filled are none, as upstream has it."""
        if self.kernel is not None:
            for name in ("w13_bias", "w2_bias"):
                if name not in layer._loaded_expert_biases:
                    layer.register_parameter(name, None)
        super().process_weights_after_loading(layer)
