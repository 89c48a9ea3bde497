# SPDX-License-Identifier: Apache-2.0
"""FP8 weights under activations that are kept, for which upstream has no kernel on CPUs."""

from typing import Any

import torch

from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_fp8 import (
    TMFp8LinearKernel,
)


class TMWFp8A16LinearKernel(TMFp8LinearKernel):
    """As its base, activations kept. The configuration of such a layer does not say so: the list
    it is chosen from does."""

    keeps_activations = True


class TMW8A16Fp8:
    """Mixed in before CompressedTensorsW8A16Fp8: our kernel takes the loader's tensors as they are.
    Upstream's own way ends in an assertion where weights are in blocks and no activations are
    described."""

    linear_kernel: Any

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Kernel layout, or upstream's."""
        if isinstance(self.linear_kernel, TMWFp8A16LinearKernel):
            self.linear_kernel.process_weights_after_loading(layer)
        else:
            super().process_weights_after_loading(layer)  # type: ignore[misc]
