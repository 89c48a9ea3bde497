# SPDX-License-Identifier: Apache-2.0
"""W8A8 linear layers: vLLM's interface of scaled int8 products here, our ops there."""

from collections.abc import Sequence

import torch
from torch import Tensor
from vllm.model_executor.kernels.linear import (
    Int8ScaledMMLinearKernel,
    Int8ScaledMMLinearLayerConfig,
)

from vllm_plugin_tm import envs, machine, selftest
from vllm_plugin_tm.quantization import grouped_int
from vllm_plugin_tm.quantization.kernel import put
from vllm_plugin_tm.quantization.linear_kernel import (
    WEIGHT_SUM,
    TMLinearKernel,
    layer_name,
    part_sizes,
)
from vllm_plugin_tm.quantization.support_matrix import CHANNEL, check_machine

_INT8 = torch.iinfo(torch.int8)


class TMInt8ScaledMMLinearKernel(TMLinearKernel, Int8ScaledMMLinearKernel):
    """int8 weights with a scale for each channel or tensor, activations rounded to int8: per token
    while running, or per tensor with the checkpoint's scale, with or without a zero point."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """(True, None), or (False, the reason): whether this machine runs the kernel. The
        configuration does not name the activations' dtype; it is torch's default while vLLM builds
        a model."""
        dtype = str(torch.get_default_dtype()).removeprefix("torch.")
        verdict = check_machine("w8a8", machine.detect(), envs.schemes(), act_dtype=dtype)
        problem = selftest.gpu_failure("w8a8") if verdict.ok else verdict.reason
        return problem is None, problem

    @classmethod
    def can_implement(cls, c: Int8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        """As is_supported: there is no configuration of such a layer that the kernel lacks."""
        return cls.is_supported()

    def __init__(self, c: Int8ScaledMMLinearLayerConfig, layer_param_names: Sequence[str]) -> None:
        ok, reason = self.can_implement(c)
        if not ok:
            raise ValueError(f"{type(self).__name__} cannot run this layer: {reason}")
        super().__init__(c, layer_param_names)
        self.n = 0  # output rows: the configuration does not have them, the layer does
        # A kernel that computes wrongly here must never see a weight.
        selftest.require("w8a8")

    @property
    def group_size(self) -> int:
        """CHANNEL: one scale for a tensor is held as one for each of its channels."""
        return CHANNEL

    @property
    def note(self) -> str:
        """How activations are rounded."""
        scale = "static" if self.config.is_static_input_scheme else "per token"
        return f"int8 activations, {scale}" + (
            "" if self.config.input_symmetric else ", with zero point"
        )

    def disk_tensors(self, layer: torch.nn.Module) -> tuple[str, ...]:
        """Weights and their scales; for static activations also their scale and zero point."""
        weight, weight_scale, scale, zero_point, _ = self.layer_param_names
        names = [weight, weight_scale]
        if self.config.is_static_input_scheme:
            names.append(scale)
            if not self.config.input_symmetric:
                names.append(zero_point)
        return tuple(names)

    def output_size(self, layer: torch.nn.Module) -> int:
        """Output rows of this shard of the layer."""
        return sum(part_sizes(layer)) or self.n

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Validates the layer's disk tensors and replaces them by their kernel layout.

        Raises ValueError naming layer and tensor for a shape or dtype that does not fit, for scales
        that are no numbers, and for a static scale that is not positive.
        """
        w_name, ws_name, xs_name, xz_name, _ = self.layer_param_names
        name = layer_name(layer)
        weight = grouped_int.oriented(layer, w_name, name)
        n, k = weight.shape
        grouped_int.check(name, w_name, weight, (n, k), torch.int8)
        scale = self._channel_scales(layer, n)
        # Everything is read and refused before anything is replaced.
        static = self._static(layer) if self.config.is_static_input_scheme else None

        packed, scales, sums = torch.ops.vllm_plugin_tm.w8a8_pack(weight, scale)
        self.n = n
        put(layer, w_name, packed)
        put(layer, ws_name, scales)
        put(layer, WEIGHT_SUM, sums)
        if static is not None:
            put(layer, xs_name, static[0])
            if not self.config.input_symmetric:
                put(layer, xz_name, static[1])

    def apply_weights(
        self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """x [..., K], rounded to int8, times the layer's weights plus bias [N]: [..., N] in x's
        dtype."""
        w_name, ws_name, xs_name, xz_name, _ = self.layer_param_names
        # Depends on the configuration only: nothing here may depend on x (see torch.compile).
        static, symmetric = self.config.is_static_input_scheme, self.config.input_symmetric
        return torch.ops.vllm_plugin_tm.w8a8_linear(
            x,
            getattr(layer, w_name),
            getattr(layer, ws_name),
            getattr(layer, WEIGHT_SUM),
            bias,
            self.n,
            getattr(layer, xs_name) if static else None,
            getattr(layer, xz_name) if static and not symmetric else None,
            symmetric,
        )

    def settle_dummy(self, layer: torch.nn.Module) -> None:
        """Random static scales may be negative."""
        if self.config.is_static_input_scheme:
            getattr(layer, self.layer_param_names[2]).data.abs_().clamp_(min=1e-6)

    def _static(self, layer: torch.nn.Module) -> tuple[Tensor, Tensor]:
        """(scale float32 [1], zero point int32 [1]) of static activations. Of several, for parts
        that were calibrated apart, the smallest range that holds all of theirs."""
        _, _, scale_name, zero_name, _ = self.layer_param_names
        name = layer_name(layer)
        scale = _scalars(name, scale_name, getattr(layer, scale_name, None))
        if scale.dtype != torch.float32:
            raise ValueError(
                f"{name}.{scale_name}: expected dtype torch.float32, found {scale.dtype}"
            )
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise ValueError(
                f"{name}.{scale_name}: expected positive finite scales, found {scale.tolist()}"
            )
        if self.config.input_symmetric:
            return scale.max().reshape(1), torch.zeros_like(scale[:1], dtype=torch.int32)
        zero = _scalars(name, zero_name, getattr(layer, zero_name, None))
        if zero.is_floating_point() or zero.numel() != scale.numel():
            raise ValueError(
                f"{name}.{zero_name}: expected {scale.numel()} integers, found {zero.dtype} "
                f"{tuple(zero.shape)}"
            )
        zero = zero.to(torch.int32)
        if bool(((zero < _INT8.min) | (zero > _INT8.max)).any()):
            raise ValueError(
                f"{name}.{zero_name}: expected {_INT8.min} to {_INT8.max}, found {zero.tolist()}"
            )
        if scale.numel() == 1:
            return scale.clone(), zero.clone()
        low = (scale * (_INT8.min - zero)).min()
        high = (scale * (_INT8.max - zero)).max()
        one = (high - low) / (_INT8.max - _INT8.min)
        return one.reshape(1), (_INT8.min - low / one).round().to(torch.int32).reshape(1)

    def _channel_scales(self, layer: torch.nn.Module, n: int) -> Tensor:
        """float32 [N, 1] from one scale per channel, per fused part, or for all."""
        scale_name = self.layer_param_names[1]
        name = layer_name(layer)
        param = getattr(layer, scale_name, None)
        if param is None:
            raise ValueError(f"{name}.{scale_name}: the layer has no such tensor")
        data = param.data
        if data.dtype != torch.float32:
            raise ValueError(
                f"{name}.{scale_name}: expected dtype torch.float32, found {data.dtype}"
            )
        widths = part_sizes(layer) or (n,)
        expected = n if self.config.is_channelwise else len(widths)
        if data.numel() != expected or data.dim() > 2 or sum(widths) != n:
            raise ValueError(
                f"{name}.{scale_name}: expected {expected} scales for output sizes {widths}, "
                f"found shape {tuple(data.shape)} for {n} output rows"
            )
        data = data.reshape(-1, 1)
        grouped_int.check_finite(name, scale_name, data)
        if not self.config.is_channelwise:
            data = data.repeat_interleave(torch.tensor(widths, device=data.device), dim=0)
        return data.contiguous()


def _scalars(layer: str, name: str, param: Tensor | None) -> Tensor:
    """The parameter's values as [count], at least one."""
    if param is None or param.numel() == 0:
        raise ValueError(f"{layer}.{name}: the layer has no such tensor")
    return param.data.reshape(-1)
