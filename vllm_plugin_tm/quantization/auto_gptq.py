# SPDX-License-Identifier: Apache-2.0
"""Routed experts of GPTQ checkpoints. Their linear layers come through the mixed-precision list."""

from typing import Any

from vllm_plugin_tm.quantization.experts_kernel import Names
from vllm_plugin_tm.quantization.experts_method import TMExpertsMethod, moe_request


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
            self.input_dtype = None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Biases that no checkpoint tensor filled are none, as upstream has it."""
        if self.kernel is not None:
            for name in ("w13_bias", "w2_bias"):
                if name not in layer._loaded_expert_biases:
                    layer.register_parameter(name, None)
        super().process_weights_after_loading(layer)
