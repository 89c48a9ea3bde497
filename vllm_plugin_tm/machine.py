# SPDX-License-Identifier: Apache-2.0
"""What this machine offers to the kernels, as the support matrix wants to know it."""

from vllm_plugin_tm import envs
from vllm_plugin_tm.kernels import ops
from vllm_plugin_tm.quantization.support_matrix import Machine


def detect() -> Machine:
    """This process's CPU. Loads torch and, where it is built, the extension; never raises for
    a missing extension: the machine then simply has no instruction set that we can use."""
    import torch

    return Machine(
        device="cpu",
        isa=ops.get_isa() if ops.is_available() and ops.cpu_isas() else None,
        amx=bool(torch.cpu._is_amx_tile_supported()),
        isa_forced=envs.isa() != "auto",
    )
