# SPDX-License-Identifier: Apache-2.0
"""AWQ checkpoints: routed experts, and linear layers, whose kernel comes from the mixed-precision
list. Both subtract the zero points that the files carry, also where the configuration says
`zero_point: false`: such files hold the middle code everywhere."""

import copy
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import Tensor

from vllm_plugin_tm.quantization.experts_kernel import Names
from vllm_plugin_tm.quantization.experts_method import TMExpertsMethod, moe_request

_BITS = 4
# Where the columns 0 to 7 of a word lie in it.
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]


def standard_order(codes: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """One expert's int32 [K, N/8] codes and [G, N/8] zero points in AWQ's order, as signed codes
    int8 [N, K] and zero points int32 [N/8, G] in compressed-tensors'."""
    if zero_point is not None:
        zero_point = pack_to_int32(_columns(zero_point).t().contiguous(), _BITS, packed_dim=0)
    return _columns(codes).t(), zero_point


def _columns(words: Tensor) -> Tensor:
    """Signed values int8 [rows, N] of int32 [rows, N/8]."""
    rows, n = words.shape[0], words.shape[1] * len(_PLACES)
    values = unpack_from_int32(words, _BITS, torch.Size((rows, n)))
    return values.view(rows, -1, len(_PLACES))[:, :, _PLACES].reshape(rows, n)


class TMAWQLinear:
    """Mixed in before AutoAWQMarlinLinearMethod. Without zero points upstream asks the kernels for
    codes that count from 0, which are not what such files hold."""

    def __init__(self, quant_config: Any) -> None:
        if not quant_config.zero_point:
            quant_config = copy.copy(quant_config)
            quant_config.zero_point = True
        super().__init__(quant_config)  # type: ignore[call-arg]


class TMAWQExperts(TMExpertsMethod):
    """Mixed in before AutoAWQMoEMethod: codes packed along the output, zero points."""

    names = Names("qweight", "scales", "qzeros", k_first=True, reorder=standard_order)

    def __init__(self, quant_config: Any, moe: Any) -> None:
        def upstream() -> None:
            super(TMAWQExperts, self).__init__(quant_config, moe)  # type: ignore[call-arg]

        wanted = moe_request(moe, "w4a16", "uint4", True, quant_config.group_size)
        if self._begin(moe, wanted, upstream):
            self.quant_config = quant_config
            self.input_dtype = None
