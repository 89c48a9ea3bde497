# SPDX-License-Identifier: Apache-2.0
"""Patch: subclasses of upstream's methods for routed experts, under the same names in their
modules, from which upstream imports them when a layer is built."""

from vllm_plugin_tm.patch.class_swap import ClassSwap, ClassSwaps
from vllm_plugin_tm.quantization import auto_awq, auto_gptq, fp8, modelopt, mxfp4
from vllm_plugin_tm.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w4a4_fp4,
    compressed_tensors_moe_w4a8_int8,
    compressed_tensors_moe_w8a8_fp8,
    compressed_tensors_moe_w8a8_int8,
    compressed_tensors_moe_wna16,
)

_Q = "vllm.model_executor.layers.quantization"
_CT = f"{_Q}.compressed_tensors.compressed_tensors_moe"

SWAPS = ClassSwaps(
    (
        ClassSwap(
            f"{_CT}.compressed_tensors_moe_wna16",
            "CompressedTensorsWNA16MoEMethod",
            compressed_tensors_moe_wna16.TMWNA16Experts,
        ),
        ClassSwap(
            f"{_Q}.compressed_tensors.compressed_tensors",
            "CompressedTensorsMoEMethod",
            compressed_tensors_moe_wna16.TMExpertsChoice,
        ),
        ClassSwap(
            f"{_CT}.compressed_tensors_moe_w8a8_int8",
            "CompressedTensorsW8A8Int8MoEMethod",
            compressed_tensors_moe_w8a8_int8.TMW8A8Int8Experts,
        ),
        ClassSwap(
            f"{_CT}.compressed_tensors_moe_w4a8_int8",
            "CompressedTensorsW4A8Int8MoEMethod",
            compressed_tensors_moe_w4a8_int8.TMW4A8Int8Experts,
        ),
        ClassSwap(
            f"{_CT}.compressed_tensors_moe_w8a8_fp8",
            "CompressedTensorsW8A8Fp8MoEMethod",
            compressed_tensors_moe_w8a8_fp8.TMW8A8Fp8Experts,
        ),
        ClassSwap(
            f"{_CT}.compressed_tensors_moe_w4a4_mxfp4",
            "CompressedTensorsW4A4Mxfp4MoEMethod",
            compressed_tensors_moe_w4a4_fp4.TMMxFp4Experts,
        ),
        ClassSwap(
            f"{_CT}.compressed_tensors_moe_w4a4_nvfp4",
            "CompressedTensorsW4A4Nvfp4MoEMethod",
            compressed_tensors_moe_w4a4_fp4.TMNvFp4Experts,
        ),
        ClassSwap(f"{_Q}.fp8", "Fp8MoEMethod", fp8.TMFp8Experts),
        ClassSwap(f"{_Q}.mxfp4", "GptOssMxfp4MoEMethod", mxfp4.TMGptOssExperts),
        # Where one kind is all of a checkpoint its configuration has the class, where kinds are
        # mixed the module, which takes Fp8MoEMethod from the one above.
        *(
            ClassSwap(f"{_Q}.modelopt", name, mixin)
            for name, mixin in (
                ("ModelOptFp8MoEMethod", modelopt.TMModelOptFp8Experts),
                ("ModelOptFp8Config.FusedMoEMethodCls", modelopt.TMModelOptFp8Experts),
                ("ModelOptNvFp4FusedMoE", modelopt.TMModelOptNvFp4Experts),
                ("ModelOptNvFp4Config.FusedMoEMethodCls", modelopt.TMModelOptNvFp4Experts),
            )
        ),
        ClassSwap(f"{_Q}.auto_gptq", "AutoGPTQMoEMethod", auto_gptq.TMGPTQExperts),
        ClassSwap(f"{_Q}.auto_awq", "AutoAWQMoEMethod", auto_awq.TMAWQExperts),
    )
)
install, remove, installed = SWAPS.install, SWAPS.remove, SWAPS.installed
