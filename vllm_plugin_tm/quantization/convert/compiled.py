# SPDX-License-Identifier: Apache-2.0
"""The compiled quantizer of weights, for what it takes; its bits are those of rounding.py."""

import functools

import torch
from torch import Tensor

from vllm_plugin_tm.kernels import ops
from vllm_plugin_tm.quantization.convert.rounding import Rounding, check_finite
from vllm_plugin_tm.quantization.support_matrix import CHANNEL

_LANES = 8  # weights that the kernel handles together: groups are multiples
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def quantize_weights(
    weight: Tensor, rounding: Rounding, scale_dtype: torch.dtype, *, packed: bool
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """rounding.quantize_int, or None where only that can do it.

    `packed`: codes are int32 words as compressed-tensors packs them, [N, K * bits / 32]. Raises
    NotFiniteError naming the first weight that is infinite or not a number.
    """
    k = weight.shape[1]
    size = k if rounding.group_size == CHANNEL else rounding.group_size
    possible = (
        rounding.method in ("rtn", "signed")
        and rounding.bits in (4, 8)
        and size % _LANES == 0
        and weight.numel() > 0
        and weight.device.type == "cpu"
        and {weight.dtype, scale_dtype} <= set(_DTYPES)
    )
    if not possible or not _is_available():
        return None
    kind = "asymmetric" if not rounding.symmetric else "centred"
    if rounding.method == "signed":
        kind = "signed"
    codes, scale, zero, bad = torch.ops.vllm_plugin_tm.quantize_weights(
        weight.contiguous(), size, rounding.bits, kind, packed, scale_dtype
    )
    if bad >= 0:
        check_finite(weight)
    return codes, scale, zero if kind == "asymmetric" else None


@functools.cache
def _is_available() -> bool:
    return ops.is_available() and bool(ops.cpu_isas())
