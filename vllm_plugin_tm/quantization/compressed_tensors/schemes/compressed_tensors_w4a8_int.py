# SPDX-License-Identifier: Apache-2.0
"""W4A8 linear layers of int-quantized checkpoints: 4-bit weights, a byte each on disk."""

import torch

from vllm_plugin_tm.quantization import grouped_int
from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_wNa16 import (
    TMWNA16LinearKernel,
)

_ALIAS = "weight"


class TMW4A8IntLinearKernel(TMWNA16LinearKernel):
    """As its base, for CompressedTensorsW4A8Int: int8 [N, K] weights, held at 4 bits each after
    loading, and int8 activations.

    Upstream registers one tensor under two names, `weight` (the checkpoint's) and `weight_packed`
    (the kernel's). The kernel layout takes the second; the first is let go.
    """

    weight_types = ("int4",)

    def disk_tensors(self, layer: torch.nn.Module) -> tuple[str, ...]:
        """The codes under the checkpoint's name for them, and the scales."""
        return (self._codes(layer), self.w_s_name)

    def _codes(self, layer: torch.nn.Module) -> str:
        # A reload restores the two names as two tensors and fills the checkpoint's.
        return _ALIAS if getattr(layer, _ALIAS, None) is not None else self.w_q_name

    def _read(
        self, layer: torch.nn.Module, expected: grouped_int.Expected
    ) -> grouped_int.GroupedInt:
        return grouped_int.read_bytes(layer, expected, self._codes(layer), self.w_s_name)

    def _pack(
        self, layer: torch.nn.Module, disk: grouped_int.GroupedInt, expected: grouped_int.Expected
    ) -> None:
        super()._pack(layer, disk, expected)
        if getattr(layer, _ALIAS, None) is not None:
            setattr(layer, _ALIAS, None)

    def settle_dummy(self, layer: torch.nn.Module) -> None:
        """Random bytes are no 4-bit weights."""
        limit = 1 << 3
        getattr(layer, self._codes(layer)).data.clamp_(-limit, limit - 1)
