# SPDX-License-Identifier: Apache-2.0
"""Patch: our W8A8 kernel before upstream's in the device's list of scaled int8 linear kernels."""

from vllm.model_executor.kernels import linear

from vllm_plugin_tm.patch.kernel_list import KernelList, platform
from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_int8 import (
    TMInt8ScaledMMLinearKernel,
)

_list = KernelList(lambda: linear._POSSIBLE_INT8_KERNELS[platform()], (TMInt8ScaledMMLinearKernel,))
install, remove, installed = _list.install, _list.remove, _list.installed
