# SPDX-License-Identifier: Apache-2.0
"""Linear layers that are quantized as their weights arrive."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import QKVParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.parameter import ModelWeightParameter

from vllm_plugin_tm.quantization.convert.options import Options
from vllm_plugin_tm.quantization.convert.plan import indivisible
from vllm_plugin_tm.quantization.convert.run import unit_rows
from vllm_plugin_tm.quantization.online.arrivals import keeping, pieces_of
from vllm_plugin_tm.quantization.online.fill import fill
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
        left = self._settle(layer, *arguments[:4])
        if left is not None:
            method: Any = UnquantizedLinearMethod()
            method.tm_note = left
            layer.quant_method = method
            method.create_weights(layer, *arguments, **extra_weight_attrs)
            return
        self._arguments, self._attributes = arguments, extra_weight_attrs
        # A rehearsal: what no kernel runs is refused now, and not when half a model is loaded.
        with torch.device("meta"):
            rehearsal: Any = torch.nn.Module()
            rehearsal.scheme = layer.scheme
            if hasattr(layer, "tp_size"):  # a layer may be whole where others are split
                rehearsal.tp_size = layer.tp_size
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
            weight_loader=keeping(extra_weight_attrs["weight_loader"]),
        )
        layer.register_parameter("weight", weight)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantizes `weight` and has the scheme process what comes of it.

        Raises OnlineError for weights that are no finite numbers.
        """
        if getattr(layer, DONE, False):
            return
        weight: Tensor = layer._parameters.pop("weight")
        options = self._config.options
        pieces = pieces_of(weight, unit_rows(options))
        # An update has another default than loading, and a kernel for int8 learns from it alone
        # what activations will be.
        with _default_dtype(weight.dtype):
            super().create_weights(layer, *self._arguments, **self._attributes)
        row_parallel = self._arguments[0] != self._arguments[2]
        parts = {name: param.data for name, param in layer.named_parameters(recurse=False)}
        scale_dtype = self._config.scale_dtype(weight.dtype)
        group, name = self._group_size, self._prefix
        fill(parts, pieces, group, options, scale_dtype, split=row_parallel, layer=name)
        del weight, pieces
        super().process_weights_after_loading(layer)
        setattr(layer, DONE, True)

    def _settle(
        self, layer: Any, part_k: int, parts: list[int], full_k: int, full_n: int
    ) -> str | None:
        """Gives the layer its scheme. Why it stays unquantized, as asked; else None."""
        options = self._config.options
        size = options.weight_group
        members = whole_outputs(layer, full_n)
        problems = (indivisible(n, full_k, options) for n in members)
        problem = next((found for found in problems if found is not None), None)
        if problem is not None:
            if options.on_indivisible == "error":
                raise OnlineError(
                    f'{self._prefix}: {problem}; {KEY}.on_indivisible "channel" gives such a layer '
                    'one scale per output channel, "skip" leaves it as it is'
                )
            if options.on_indivisible == "skip":
                return f"{problem}, as asked"
            size = CHANNEL
        if size != CHANNEL:
            refuse_cut(self._prefix, "input", full_k, part_k, options)
        if options.in_blocks(size):
            for full, part in zip(members, parts, strict=True):
                refuse_cut(self._prefix, "output", full, part, options)
        self._group_size = size
        self.quantization_config = self._config.compressed(size)
        layer.scheme = self.quantization_config.get_scheme(layer=layer, layer_name=self._prefix)
        return None


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def refuse_cut(layer: str, what: str, full: int, part: int, options: Options) -> None:
    """Raises OnlineError where a shard's part of the `what` size would cut a group or block."""
    word, size = "block" if options.blocks else "group", options.weight_group
    if part % size:
        raise OnlineError(
            f"{layer}: its {what} size ({full}) is split into parts of {part}, which is no "
            f"multiple of the {word} size ({size}); a smaller {word} size, or a smaller "
            "--tensor-parallel-size, fits"
        )


def whole_outputs(layer: Any, full: int) -> list[int]:
    """Output sizes of the modules that are fused in a layer, as the checkpoint has them."""
    if isinstance(layer, QKVParallelLinear):
        # The layer's own sizes count the copies of heads that ranks share.
        query, kv = layer.total_num_heads, layer.total_num_kv_heads
        return [query * layer.head_size, kv * layer.head_size, kv * layer.v_head_size]
    return list(getattr(layer, "output_sizes", [full]))
