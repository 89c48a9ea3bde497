# SPDX-License-Identifier: Apache-2.0
"""Makes a processor with AMX run as one without: `--no-amx`.

Peers: oneDNN's environment variable, for this process and its children, keeps it from AMX in torch
and in vLLM. vLLM chooses its own kernels by what torch says of the processor, which is changed for
this process. Our kernels: `isa` names what to run them on.
"""

from vllm_plugin_tm import envs
from vllm_plugin_tm.kernels import ops

_NEXT = "avx512vnni"


def hide() -> None:
    """From now on neither torch, nor oneDNN, nor vLLM's choice of kernels sees AMX in this process.

    Call it before the first product: oneDNN reads its variable once. Loads torch.
    """
    import torch

    envs.keep_onednn_from_amx()
    for name in ("_is_amx_tile_supported", "_is_amx_fp16_supported"):
        setattr(torch.cpu, name, lambda: False)


def isa() -> str:
    """The instruction set that our kernels use by default, or would use without AMX. Needs the
    extension."""
    chosen = ops.get_isa()
    # As csrc/cpu/isa.cpp chooses on processors with AMX: their bf16 dot is slower than fp32
    # multiply-adds, so that avx512bf16 is not the next one.
    return _NEXT if chosen == "amx" else chosen


def is_hidden() -> bool:
    """Whether hide was called here, or in the process that started this one."""
    return envs.onednn_kept_from_amx()
