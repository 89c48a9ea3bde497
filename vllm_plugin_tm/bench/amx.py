# SPDX-License-Identifier: Apache-2.0
"""Peers as they are on a processor without AMX, on one that has it.

Our kernels do not use AMX: they are for the processors that lack it. On one that has it, upstream
and torch run other kernels than there, and a comparison says nothing about the others. oneDNN, in
torch and in vLLM, is told by its environment variable what it may use; vLLM's own kernels are
chosen in Python, by what torch says of the processor. Both are set for this process, the first for
its children too.
"""

from vllm_plugin_tm import envs


def hide() -> None:
    """From now on neither torch, nor oneDNN, nor vLLM's choice of kernels sees AMX in this process.

    Call it before the first product: oneDNN reads its variable once. Loads torch.
    """
    import torch

    envs.keep_onednn_from_amx()
    for name in ("_is_amx_tile_supported", "_is_amx_fp16_supported"):
        setattr(torch.cpu, name, lambda: False)


def is_hidden() -> bool:
    """Whether hide was called here, or in the process that started this one."""
    return envs.onednn_kept_from_amx()
