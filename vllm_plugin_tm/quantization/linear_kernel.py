# SPDX-License-Identifier: Apache-2.0
"""What all linear kernel classes of ours offer beyond upstream's interfaces: what the checks of a
checkpoint and the layer table ask. No arithmetic."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from vllm.model_executor.utils import replace_parameter

WEIGHT_SUM = "weight_sum"
"""The parameter beside int8 weights: int32 [padded N], the sum of each channel's weights."""


class TMLinearKernel(ABC):
    """Mixed into upstream's kernel interfaces. Keeps no tensor: what a kernel needs is registered
    on the layer, under the names and with the shapes it had the time before, so that vLLM may
    reload weights and process them again."""

    @property
    @abstractmethod
    def group_size(self) -> int:
        """Weights that share a scale, CHANNEL for all of an output channel."""

    @property
    @abstractmethod
    def note(self) -> str:
        """What the layer table should say beside kernel and group size; empty for nothing."""

    @abstractmethod
    def disk_tensors(self, layer: torch.nn.Module) -> tuple[str, ...]:
        """Names of the layer's parameters that a checkpoint must fill."""

    @abstractmethod
    def output_size(self, layer: torch.nn.Module) -> int:
        """Output rows of this shard of the layer."""

    @abstractmethod
    def settle_dummy(self, layer: torch.nn.Module) -> None:
        """Brings disk tensors with random contents (load format "dummy") into the range that a
        checkpoint's have."""


def layer_name(layer: torch.nn.Module) -> str:
    """The layer's name in the model, for messages."""
    return str(getattr(layer, "prefix", "") or type(layer).__name__)


def part_sizes(layer: torch.nn.Module) -> tuple[int, ...]:
    """Output sizes of the modules that are fused in this shard of the layer; empty if unknown."""
    sizes = getattr(layer, "logical_widths", None) or getattr(layer, "output_partition_sizes", None)
    return tuple(int(size) for size in sizes or ())


def put(layer: torch.nn.Module, name: str, tensor: Tensor) -> None:
    """Registers `tensor` as the layer's parameter `name`, keeping the weight loader it had."""
    # By position: the third parameter was renamed in vLLM 0.28.
    replace_parameter(layer, name, tensor)
