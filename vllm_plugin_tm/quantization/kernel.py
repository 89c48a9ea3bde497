# SPDX-License-Identifier: Apache-2.0
"""What all kernel classes of ours say of themselves: to the layer table and to the checks of a
checkpoint. No arithmetic."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from vllm.model_executor.utils import replace_parameter

from vllm_plugin_tm.quantization.load_check import KERNEL_LAYOUT, Layer


class TMKernel(ABC):
    """Keeps no tensor: what a kernel needs is registered on the layer, under the names and with the
    shapes it had the time before, so that vLLM may reload weights and process them again."""

    @property
    @abstractmethod
    def group_size(self) -> int:
        """Weights that share a scale, CHANNEL for all of an output channel."""

    @property
    @abstractmethod
    def note(self) -> str:
        """What the layer table should say beside kernel and group size; empty for nothing."""

    @abstractmethod
    def loaded(
        self, name: str, module: torch.nn.Module, fused_from: tuple[str, ...]
    ) -> list[Layer]:
        """What a checkpoint must fill. `name` is the module's name in the model, `fused_from` the
        checkpoint's names of the modules that are fused in it, empty for none."""

    @abstractmethod
    def settle_dummy(self, layer: torch.nn.Module) -> None:
        """Brings disk tensors with random contents (load format "dummy") into the range that a
        checkpoint's have."""


def put(layer: torch.nn.Module, name: str, tensor: Tensor) -> None:
    """Registers `tensor` as the layer's parameter `name`, keeping the weight loader it had."""
    # By position: the third parameter was renamed in vLLM 0.28.
    replace_parameter(layer, name, tensor)
    setattr(getattr(layer, name), KERNEL_LAYOUT, True)
