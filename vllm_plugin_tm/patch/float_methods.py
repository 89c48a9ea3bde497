# SPDX-License-Identifier: Apache-2.0
"""Patch: what goes over FP8 and NVFP4 weights before a kernel sees them leaves them as they are
where the kernel is ours; and embeddings are looked up without Triton."""

from vllm_plugin_tm.patch.class_swap import ClassSwap, ClassSwaps
from vllm_plugin_tm.quantization.compressed_tensors.compressed_tensors_embedding import (
    TMEmbeddingWNA16,
)
from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_w4a4_fp4 import (
    TMW4A4Fp4,
)
from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_fp8 import (
    TMW8A8Fp8,
)
from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_w8a16_fp8 import (
    TMW8A16Fp8,
)
from vllm_plugin_tm.quantization.fp8 import TMFp8Linear

_Q = "vllm.model_executor.layers.quantization"
# Not where the schemes are declared: the configuration has imported them from there.
_CT = f"{_Q}.compressed_tensors.compressed_tensors"

SWAPS = ClassSwaps(
    (
        ClassSwap(_CT, "CompressedTensorsW8A8Fp8", TMW8A8Fp8),
        ClassSwap(_CT, "CompressedTensorsW8A16Fp8", TMW8A16Fp8),
        ClassSwap(_CT, "CompressedTensorsW4A4Fp4", TMW4A4Fp4),
        ClassSwap(f"{_Q}.fp8", "Fp8LinearMethod", TMFp8Linear),
        ClassSwap(_CT, "CompressedTensorsEmbeddingWNA16Int", TMEmbeddingWNA16),
    )
)
install, remove, installed = SWAPS.install, SWAPS.remove, SWAPS.installed
