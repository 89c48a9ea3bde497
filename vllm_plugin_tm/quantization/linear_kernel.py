# SPDX-License-Identifier: Apache-2.0
"""What all linear kernel classes of ours offer beyond upstream's interfaces. No arithmetic."""

from abc import abstractmethod

import torch

from vllm_plugin_tm.quantization.kernel import TMKernel
from vllm_plugin_tm.quantization.load_check import Layer

WEIGHT_SUM = "weight_sum"
"""The parameter beside int8 weights: int32 [padded N], the sum of each channel's weights."""


class TMLinearKernel(TMKernel):
    """Mixed into upstream's kernel interfaces."""

    @abstractmethod
    def disk_tensors(self, layer: torch.nn.Module) -> tuple[str, ...]:
        """Names of the layer's parameters that a checkpoint must fill."""

    @abstractmethod
    def output_size(self, layer: torch.nn.Module) -> int:
        """Output rows of this shard of the layer."""

    def loaded(
        self, name: str, module: torch.nn.Module, fused_from: tuple[str, ...]
    ) -> list[Layer]:
        """One layer, fused from several or from none."""
        sizes = getattr(module, "output_partition_sizes", ())
        sources: tuple[tuple[str, int], ...] = ((name, self.output_size(module)),)
        # A checkpoint may hold the layer in one piece, whatever the model could fuse it from.
        if len(fused_from) == len(sizes):
            sources = tuple(zip(fused_from, sizes, strict=True)) or sources
        return [Layer(name, module, self.disk_tensors(module), sources)]


def layer_name(layer: torch.nn.Module) -> str:
    """The layer's name in the model, for messages."""
    return str(getattr(layer, "prefix", "") or type(layer).__name__)


def part_sizes(layer: torch.nn.Module) -> tuple[int, ...]:
    """Output sizes of the modules that are fused in this shard of the layer; empty if unknown."""
    sizes = getattr(layer, "logical_widths", None) or getattr(layer, "output_partition_sizes", None)
    return tuple(int(size) for size in sizes or ())
