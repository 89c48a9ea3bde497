# SPDX-License-Identifier: Apache-2.0
"""Patch: our kernels before upstream's in the device's list of mixed-precision linear kernels."""

from vllm.model_executor.kernels import linear

from vllm_plugin_tm.patch.kernel_list import KernelList, platform
from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_w4a8_int import (
    TMW4A8IntLinearKernel,
)
from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_wNa16 import (
    TMWNA16LinearKernel,
)

_list = KernelList(
    lambda: linear._POSSIBLE_KERNELS[platform()],
    (TMWNA16LinearKernel, TMW4A8IntLinearKernel),
)
install, remove, installed = _list.install, _list.remove, _list.installed
