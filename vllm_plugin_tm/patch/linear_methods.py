# SPDX-License-Identifier: Apache-2.0
"""Patch: GPTQ layers that Marlin could not run, and AWQ layers without zero points, come as far as
the list of kernels as what they are."""

from vllm_plugin_tm.patch.class_swap import ClassSwap, ClassSwaps
from vllm_plugin_tm.quantization import auto_awq, auto_gptq

_Q = "vllm.model_executor.layers.quantization"

SWAPS = ClassSwaps(
    (
        ClassSwap(f"{_Q}.auto_gptq", "AutoGPTQLinearMethod", auto_gptq.TMGPTQLinear),
        ClassSwap(f"{_Q}.auto_awq", "AutoAWQMarlinLinearMethod", auto_awq.TMAWQLinear),
    )
)
install, remove, installed = SWAPS.install, SWAPS.remove, SWAPS.installed
