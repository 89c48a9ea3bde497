# SPDX-License-Identifier: Apache-2.0
"""Patch: our W4A16 kernel before upstream's in the CPU list of mixed-precision linear kernels."""

from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear import MPLinearKernel
from vllm.platforms import PlatformEnum

from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_wNa16 import (
    TMW4A16LinearKernel,
)


def _kernels() -> list[type[MPLinearKernel]]:
    """The live list. It is changed in place: schemes hold references to its chooser."""
    return linear._POSSIBLE_KERNELS[PlatformEnum.CPU]


def install() -> None:
    """First in the list is first asked. Does nothing when it is there already."""
    if not installed():
        remove()
        _kernels().insert(0, TMW4A16LinearKernel)


def remove() -> None:
    """Takes our kernel out of the list wherever it stands."""
    kernels = _kernels()
    while TMW4A16LinearKernel in kernels:
        kernels.remove(TMW4A16LinearKernel)


def installed() -> bool:
    """Whether our kernel is the first that the chooser asks."""
    kernels = _kernels()
    return bool(kernels) and kernels[0] is TMW4A16LinearKernel
