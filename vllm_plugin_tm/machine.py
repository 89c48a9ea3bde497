# SPDX-License-Identifier: Apache-2.0
"""What this machine offers to the kernels, as the support matrix wants to know it."""

from typing import Literal

from vllm_plugin_tm.kernels import ops
from vllm_plugin_tm.quantization.support_matrix import CUDA_ISAS, Machine

Device = Literal["cpu", "cuda"]

_device: Device = "cpu"


def device() -> Device:
    """Where layers run in this process: what `use` was told last, a CPU before."""
    return _device


def use(name: Device) -> None:
    """Says where layers run in this process: as vLLM's platform has it."""
    global _device
    _device = name


def detect() -> Machine:
    """This process's device. Loads torch and, where it is built, the extension; never raises for
    a missing extension: the machine then simply has no instruction set that we can use."""
    if device() == "cuda":
        return Machine("cuda", gpu_isa() if ops.is_available() and ops.has_cuda() else None)
    return Machine("cpu", ops.get_isa() if ops.is_available() and ops.cpu_isas() else None)


def gpu_isa() -> str | None:
    """The member of CUDA_ISAS for the GPU of vLLM's CUDA platform, or None."""
    from vllm.platforms import current_platform

    # vLLM asks the driver, which starts nothing on the GPU: workers may still be forked.
    found = current_platform.get_device_capability()
    return None if found is None else cuda_isa(found.major, found.minor)


def cuda_isa(major: int, minor: int) -> str | None:
    """The member of CUDA_ISAS for a GPU's compute capability, or None."""
    name = f"sm_{major}{minor}"
    if name in CUDA_ISAS:
        return name
    return CUDA_ISAS[-1] if (major, minor) > (9, 0) else None
