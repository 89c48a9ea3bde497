# SPDX-License-Identifier: Apache-2.0
"""FP8 checkpoints as DeepSeek and Qwen have them (quantization method "fp8"): linear layers and
routed experts."""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.quantization import fp8

from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_fp8 import (
    TMFp8LinearKernel,
)
from vllm_plugin_tm.quantization.experts_kernel import Names
from vllm_plugin_tm.quantization.experts_method import TMExpertsMethod, moe_request
from vllm_plugin_tm.quantization.float_experts_kernel import FloatFormat
from vllm_plugin_tm.quantization.linear_kernel import layer_name

X_GROUP_SIZE = 128
"""The neighbours in activations that share a scale beside experts in blocks, whatever those are."""


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
            block = getattr(layer, "weight_block_size", None)
            if block is not None:
                _refuse_cut_blocks(layer, output_partition_sizes, output_size, block[0])

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


def _refuse_cut_blocks(
    layer: torch.nn.Module, parts: list[int], output_size: int, rows: int
) -> None:
    """Raises ValueError for parts of a fused layer, and for shards, that end inside a block of
    `rows` output rows. Upstream lets fused layers through, although one row of scales cannot be of
    two blocks; the last part alone may end as it likes, where it is whole."""
    split = output_size != sum(parts)
    for part in parts if split else parts[:-1]:
        if part % rows:
            what = "of a shard" if split else "of a part of a fused layer"
            raise ValueError(
                f"{layer_name(layer)}: the output size {what} ({part}, of {parts}) must be a "
                f"multiple of the {rows} output rows of a block of FP8 weights"
            )


class TMFp8Experts(TMExpertsMethod):
    """Mixed in before Fp8MoEMethod."""

    def __init__(self, quant_config: Any, layer: Any) -> None:
        moe, block = layer.moe_config, quant_config.weight_block_size
        static = quant_config.activation_scheme == "static"
        self.weight_scale_name = "weight_scale" if block is None else "weight_scale_inv"
        self.names = Names("weight", self.weight_scale_name)
        shape, refine = _sharded_block(moe, block)
        self.form = FloatFormat(
            blocks=() if block is None else tuple({tuple(block), tuple(shape)}),
            rounding="tensor" if static else "token" if block is None else "group",
            x_group_size=-1 if block is None else X_GROUP_SIZE,
        )

        def upstream() -> None:
            super(TMFp8Experts, self).__init__(quant_config, layer)  # type: ignore[call-arg]

        wanted = moe_request(moe, "fp8", "float8_e4m3fn", False, None)
        if self._begin(moe, wanted, upstream):
            self.quant_config = quant_config
            self.weight_block_size = block
            self.block_quant = block is not None
            self.moe_block_shape, self.weight_scale_refine = shape, refine
        refuse_no_backend(self)


def refuse_no_backend(method: Any) -> None:
    """Upstream constructs FP8 experts without a kernel to run them, and fails when their weights
    are loaded. Raises NotImplementedError with our reason, too, before that."""
    backend = getattr(method, "fp8_backend", None)
    if method.kernel is None and getattr(backend, "name", "") == "NONE":
        raise NotImplementedError(
            "No FP8 MoE backend supports the deployment configuration "
            f"(vllm-plugin-tm: {method.note})"
        )


def _sharded_block(moe: Any, block: Any) -> tuple[Any, tuple[int, int] | None]:
    """The shape of blocks once experts are cut for tensor parallelism, and how much finer that is;
    older upstreams know the checkpoint's own only."""
    resolve = getattr(fp8, "resolve_fp8_moe_weight_block_shape", None)
    if block is None or resolve is None:
        return block, None
    return resolve(moe, block, fp8.kFp8Dynamic128Sym, True)
