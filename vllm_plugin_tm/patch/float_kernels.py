# SPDX-License-Identifier: Apache-2.0
"""Patch: our FP8 and FP4 kernels before upstream's in the CPU lists of linear kernels."""

from vllm.model_executor.kernels import linear
from vllm.platforms import PlatformEnum

from vllm_plugin_tm.patch.kernel_list import KernelList
from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_w4a4_fp4 import (
    TMMxFp4LinearKernel,
    TMNvFp4LinearKernel,
)
from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_fp8 import (
    TMFp8LinearKernel,
)
from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_w8a16_fp8 import (
    TMWFp8A16LinearKernel,
)

_CPU = PlatformEnum.CPU

# Upstream has no CPU entry in the last two.
_LISTS = (
    KernelList(lambda: linear._POSSIBLE_FP8_KERNELS[_CPU], (TMFp8LinearKernel,)),
    KernelList(lambda: linear._POSSIBLE_FP8_BLOCK_KERNELS[_CPU], (TMFp8LinearKernel,)),
    KernelList(lambda: linear._POSSIBLE_WFP8A16_KERNELS[_CPU], (TMWFp8A16LinearKernel,)),
    KernelList(lambda: linear._POSSIBLE_NVFP4_KERNELS.setdefault(_CPU, []), (TMNvFp4LinearKernel,)),
    KernelList(lambda: linear._POSSIBLE_MXFP4_KERNELS.setdefault(_CPU, []), (TMMxFp4LinearKernel,)),
)
# What upstream forces for NVFP4 weights under kept activations, whatever the lists say.
_MARLIN = linear.MarlinNvFp4LinearKernel


def install() -> None:
    """First in each list is first asked."""
    for kernels in _LISTS:
        kernels.install()
    linear.MarlinNvFp4LinearKernel = TMNvFp4LinearKernel  # type: ignore[assignment,misc]


def remove() -> None:
    """Takes our kernels out, and the entries that upstream does not have."""
    for kernels in _LISTS:
        kernels.remove()
    for table in (linear._POSSIBLE_NVFP4_KERNELS, linear._POSSIBLE_MXFP4_KERNELS):
        if not table.get(_CPU, True):
            del table[_CPU]
    linear.MarlinNvFp4LinearKernel = _MARLIN  # type: ignore[misc]


def installed() -> bool:
    """Whether our kernels are the first that each chooser asks."""
    fp4 = (linear._POSSIBLE_NVFP4_KERNELS, linear._POSSIBLE_MXFP4_KERNELS)
    if not all(_CPU in table for table in fp4):
        return False
    forced = linear.MarlinNvFp4LinearKernel is TMNvFp4LinearKernel
    return forced and all(kernels.installed() for kernels in _LISTS)
