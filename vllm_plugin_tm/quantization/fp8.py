# SPDX-License-Identifier: Apache-2.0
"""Linear layers of FP8 checkpoints as DeepSeek and Qwen have them (quantization method "fp8")."""

from typing import Any

import torch
from torch import Tensor

from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_fp8 import (
    TMFp8LinearKernel,
)


class TMFp8Linear:
    """Mixed in before Fp8LinearMethod: our kernel takes the loader's tensors as they are."""

    fp8_linear: Any
    use_marlin: bool

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Upstream's; it chooses the kernel."""
        super().create_weights(  # type: ignore[misc]
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra_weight_attrs,
        )
        if isinstance(self.fp8_linear, TMFp8LinearKernel):
            # Upstream's word for weights that nobody may read but the kernel: what wants them as
            # numbers (multi-head latent attention) asks the layer.
            self.use_marlin = True

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Kernel layout, or upstream's."""
        if not isinstance(self.fp8_linear, TMFp8LinearKernel):
            super().process_weights_after_loading(layer)  # type: ignore[misc]
            return
        self.fp8_linear.process_weights_after_loading(layer)
        if not hasattr(layer, "input_scale"):
            layer.register_parameter("input_scale", None)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Our kernel's product, whatever upstream does to make a batch not matter: here it does not
        matter anyway."""
        if isinstance(self.fp8_linear, TMFp8LinearKernel):
            return self.fp8_linear.apply_weights(layer, x, bias)
        return super().apply(layer, x, bias)  # type: ignore[misc]
