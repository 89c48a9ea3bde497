# SPDX-License-Identifier: Apache-2.0
"""Linear layers that are quantized as their weights arrive."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import ModelWeightParameter

from vllm_plugin_tm import heap
from vllm_plugin_tm.quantization.online.fill import fill, finite
from vllm_plugin_tm.quantization.online.options import KEY, OnlineError
from vllm_plugin_tm.quantization.support_matrix import CHANNEL

if TYPE_CHECKING:
    from vllm_plugin_tm.quantization.online.config import TMOnlineConfig

DONE = "_already_called_process_weights_after_loading"
"""Upstream's mark of a layer that was processed as its weights arrived; its reload removes it."""


class OnlineLinearMethod(CompressedTensorsLinearMethod):
    """Before loading a layer has one 16-bit weight on the meta device; when all of it has arrived
    upstream calls for processing, and the layer becomes that of a compressed-tensors checkpoint."""

    uses_meta_device = True

    def __init__(self, config: "TMOnlineConfig", prefix: str) -> None:
        self._config, self._prefix = config, prefix
        self._group_size = config.options.weight_group
        super().__init__(config.compressed(self._group_size))

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Registers `weight` [N, K] of this shard. Raises OnlineError naming the layer where its
        groups do not fit, whatever upstream raises where no kernel takes it."""
        arguments = (
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
        )
        if not self._settle(layer, input_size, input_size_per_partition):
            method: Any = UnquantizedLinearMethod()
            method.tm_note = (
                f"its input size ({input_size}) is no multiple of the group size, as asked"
            )
            layer.quant_method = method
            method.create_weights(layer, *arguments, **extra_weight_attrs)
            return
        self._arguments, self._attributes = arguments, extra_weight_attrs
        # A rehearsal: what no kernel runs is refused now, and not when half a model is loaded.
        with torch.device("meta"):
            rehearsal: Any = torch.nn.Module()
            rehearsal.scheme = layer.scheme
            super().create_weights(rehearsal, *arguments, **extra_weight_attrs)
        layer.logical_widths = output_partition_sizes
        layer.input_size_per_partition = input_size_per_partition
        layer.output_size_per_partition = sum(output_partition_sizes)
        layer.output_partition_sizes = output_partition_sizes
        layer.orig_dtype = params_dtype
        weight = ModelWeightParameter(
            data=torch.empty(
                sum(output_partition_sizes),
                input_size_per_partition,
                device="meta",
                dtype=params_dtype,
            ),
            input_dim=1,
            output_dim=0,
            weight_loader=extra_weight_attrs.get("weight_loader"),
        )
        layer.register_parameter("weight", weight)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantizes `weight` and has the scheme process what comes of it.

        Raises OnlineError for weights that are no finite numbers.
        """
        if getattr(layer, DONE, False):
            return
        weight: Tensor = layer._parameters.pop("weight").data
        finite(self._prefix, weight)
        super().create_weights(layer, *self._arguments, **self._attributes)
        row_parallel = self._arguments[0] != self._arguments[2]
        parts = {name: param.data for name, param in layer.named_parameters(recurse=False)}
        scale_dtype = self._config.scale_dtype(weight.dtype)
        options = self._config.options
        fill(parts, weight, self._group_size, options, scale_dtype, split=row_parallel)
        del weight
        super().process_weights_after_loading(layer)
        # Temporary tensors of many sizes leave holes: 10 MB more with every 20 reloads of 3 MB.
        heap.trim()
        setattr(layer, DONE, True)

    def _settle(self, layer: Any, full: int, part: int) -> bool:
        """Gives the layer its scheme; False where it stays unquantized, as asked."""
        options = self._config.options
        size = options.weight_group
        if size != CHANNEL and full % size:
            if options.on_indivisible == "error":
                raise OnlineError(
                    f"{self._prefix}: its input size ({full}) is no multiple of the group size "
                    f'({size}); {KEY}.on_indivisible "channel" gives such a layer one scale per '
                    'output channel, "skip" leaves it as it is'
                )
            if options.on_indivisible == "skip":
                return False
            size = CHANNEL
        if size != CHANNEL and part % size:
            raise OnlineError(
                f"{self._prefix}: its input size ({full}) is split into parts of {part}, which is "
                f"no multiple of the group size ({size}); a smaller group size, or a smaller "
                "--tensor-parallel-size, fits"
            )
        self._group_size = size
        self.quantization_config = self._config.compressed(size)
        layer.scheme = self.quantization_config.get_scheme(layer=layer, layer_name=self._prefix)
        return True
