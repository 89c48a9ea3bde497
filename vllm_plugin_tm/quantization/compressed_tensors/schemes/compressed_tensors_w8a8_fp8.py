# SPDX-License-Identifier: Apache-2.0
"""FP8 linear layers: vLLM's interface of scaled FP8 products here, our ops there. One kernel for
all that reaches it: compressed-tensors, the fp8 method, ModelOpt, FBGEMM, Quark."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.kernels.linear import (
    FP8ScaledMMLinearKernel,
    FP8ScaledMMLinearLayerConfig,
)
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import ScaledMMLinearKernel

from vllm_plugin_tm import envs, machine, selftest
from vllm_plugin_tm.quantization import grouped_int, small_floats
from vllm_plugin_tm.quantization.kernel import put
from vllm_plugin_tm.quantization.linear_kernel import TMLinearKernel, layer_name, part_sizes
from vllm_plugin_tm.quantization.support_matrix import (
    CHANNEL,
    Request,
    check,
    check_machine,
)

WEIGHT_TYPE = "float8_e4m3fn"
_BLOCK_SCALE = "weight_scale_inv"  # what DeepSeek calls it


class TMFp8LinearKernel(TMLinearKernel, FP8ScaledMMLinearKernel):
    """e4m3 weights with a scale for each tensor, channel or block; activations rounded to e4m3 per
    token, per token and group, or per tensor with the checkpoint's scale.

    Where upstream takes one scale from all tokens of a batch, we take one from each: a token's
    result must not depend on its neighbours.
    """

    keeps_activations = False

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """(True, None), or (False, the reason): whether this machine runs the kernel."""
        verdict = check_machine("fp8", machine.detect(), envs.schemes())
        return verdict.ok, verdict.reason

    @classmethod
    def can_implement(cls, c: FP8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        """(True, None), or (False, the reason): whether the kernel runs layers of this kind."""
        key = c.weight_quant_key
        if key.dtype != small_floats.E4M3 or c.activation_quant_key.dtype != small_floats.E4M3:
            return False, f"weights of {key.dtype}: only {small_floats.E4M3} is supported"
        n, k = c.weight_shape
        group = CHANNEL
        if _is_block(c):
            group = small_floats.block_group(k, key.scale.group_shape.col)
        act = str(c.input_dtype).removeprefix("torch.")
        request = Request(WEIGHT_TYPE, False, group, act, k=k, n=n, full_k=k)
        verdict = check(request, machine.detect(), envs.schemes())
        return verdict.ok, verdict.reason

    def __init__(self, c: FP8ScaledMMLinearLayerConfig, layer_param_names: Sequence[str]) -> None:
        ok, reason = self.can_implement(c)
        if not ok:
            raise ValueError(f"{type(self).__name__} cannot run this layer: {reason}")
        # Past upstream's own constructor, which builds what would round activations.
        ScaledMMLinearKernel.__init__(self, c, layer_param_names)
        self.n, self.k = c.weight_shape
        # For weights under kept activations the key says 128 x 128 whatever the blocks are.
        self.block = tuple(c.weight_quant_key.scale.group_shape)
        selftest.require("fp8")

    @property
    def group_size(self) -> int:
        """Inputs that share a scale, CHANNEL where a channel has one."""
        if not _is_block(self.config):
            return CHANNEL
        return small_floats.block_group(self.k, self.block[1])

    @property
    def rounding(self) -> str:
        """The op's word for what becomes of activations."""
        if self.keeps_activations:
            return "none"
        scale = self.config.activation_quant_key.scale
        if scale.static:
            return "tensor"
        return "group" if scale.group_shape.is_per_group() else "token"

    @property
    def x_group_size(self) -> int:
        """Neighbours in x that share a scale where `rounding` is "group"; -1: those of a group of
        weights."""
        if self.rounding != "group":
            return -1
        width = int(self.config.activation_quant_key.scale.group_shape.col)
        return -1 if self.group_size == CHANNEL else width

    @property
    def note(self) -> str:
        """How activations are rounded; empty where they are kept."""
        return {
            "none": "",
            "token": "FP8 activations, per token",
            "group": "FP8 activations, per token and group",
            "tensor": "FP8 activations, static",
        }[self.rounding]

    def disk_tensors(self, layer: torch.nn.Module) -> tuple[str, ...]:
        """Weights and their scales; for static activations also their scale."""
        names = ("weight", _scale_name(layer))
        return (*names, "input_scale") if self.rounding == "tensor" else names

    def output_size(self, layer: torch.nn.Module) -> int:
        """Output rows of this shard of the layer."""
        return sum(part_sizes(layer)) or self.n

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Validates the layer's disk tensors and replaces them by their kernel layout.

        Raises ValueError naming layer and tensor for a shape or dtype that does not fit, for codes
        and scales that are no numbers, and for a static scale that is not positive.
        """
        name, scale_name = layer_name(layer), _scale_name(layer)
        weight = self._weight(layer)
        n, k = weight.shape
        codes = small_floats.e4m3_bytes(name, "weight", weight, n, k)
        scale = layer.get_parameter(scale_name).data
        if _is_block(self.config):
            self.block = tuple(getattr(layer, "weight_block_size", None) or self.block)
            scale = small_floats.block_scales(name, scale_name, scale, n, k, self.block)
        else:
            scale = small_floats.channel_scales(
                name, scale_name, scale, n, part_sizes(layer) or (n,)
            )
        # Everything is read and refused before anything is replaced.
        static = None
        if self.rounding == "tensor":
            static = small_floats.one_scale(
                name, "input_scale", getattr(layer, "input_scale", None)
            )

        packed, scales, _ = torch.ops.vllm_plugin_tm.w8a16_pack(codes, scale, None, k)
        self.n, self.k = n, k
        put(layer, "weight", packed)
        put(layer, scale_name, scales)
        if static is not None:
            put(layer, "input_scale", static)

    def apply_weights(  # type: ignore[override]
        self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """x [..., K], rounded as the layer says, times the layer's weights plus bias [N]: [..., N]
        in x's dtype."""
        # Depends on the configuration only: nothing here may depend on x (see torch.compile).
        rounding = self.rounding
        return torch.ops.vllm_plugin_tm.fp8_linear(
            x,
            layer.weight,
            getattr(layer, _scale_name(layer)),
            bias,
            self.n,
            self.group_size,
            rounding,
            layer.input_scale if rounding == "tensor" else None,
            self.x_group_size,
        )

    def apply_scaled_mm(self, **_: Any) -> Tensor:
        """Upstream's inner step, which apply_weights above does not take."""
        raise NotImplementedError(f"{type(self).__name__} has one op for rounding and product")

    def settle_dummy(self, layer: torch.nn.Module) -> None:
        """Random bytes may be no numbers, random static scales negative."""
        weight = layer.get_parameter("weight").data
        if weight.dtype == small_floats.E4M3:
            bits = weight.view(torch.uint8)
            bits.bitwise_and_(0xBF)  # below 2: the largest exponents are left out
        if self.rounding == "tensor":
            layer.get_parameter("input_scale").data.abs_().clamp_(min=1e-6)

    def _weight(self, layer: torch.nn.Module) -> Tensor:
        """The weights as [N, K]: blocks and what a checkpoint's loader left are in this order,
        methods that went over them before have transposed them."""
        param = layer.get_parameter("weight")
        if getattr(param, "output_dim", None) in (0, 1):
            return grouped_int.oriented(layer, "weight", layer_name(layer))
        return param.data if _is_block(self.config) else param.data.t().contiguous()


def _is_block(c: FP8ScaledMMLinearLayerConfig) -> bool:
    """Whether weights have a scale for each block; a channel's is (-1, 1) or (1, -1)."""
    shape = c.weight_quant_key.scale.group_shape
    return bool(shape.row > 0 and shape.col > 0)


def _scale_name(layer: torch.nn.Module) -> str:
    return _BLOCK_SCALE if hasattr(layer, _BLOCK_SCALE) else "weight_scale"


class TMW8A8Fp8:
    """Mixed in before CompressedTensorsW8A8Fp8: our kernel takes the loader's tensors as they are.
    Upstream brings several tensor scales to one before, by an op that CPUs do not have."""

    fp8_linear: Any

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Kernel layout, or upstream's."""
        if not isinstance(self.fp8_linear, TMFp8LinearKernel):
            super().process_weights_after_loading(layer)  # type: ignore[misc]
            return
        self.fp8_linear.process_weights_after_loading(layer)
        if not hasattr(layer, "input_scale"):
            layer.register_parameter("input_scale", None)
