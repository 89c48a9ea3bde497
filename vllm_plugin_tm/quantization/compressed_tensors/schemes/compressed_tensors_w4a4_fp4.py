# SPDX-License-Identifier: Apache-2.0
"""FP4 linear layers: vLLM's interfaces of MXFP4 and NVFP4 products here, our op there. Activations
are kept, also where a checkpoint would have them rounded: upstream does the same on every machine
without FP4 products."""

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.kernels.linear import MxFp4LinearKernel, NvFp4LinearKernel

from vllm_plugin_tm import envs, machine, selftest
from vllm_plugin_tm.kernels import ops
from vllm_plugin_tm.quantization import small_floats
from vllm_plugin_tm.quantization.kernel import put
from vllm_plugin_tm.quantization.linear_kernel import TMLinearKernel, layer_name, part_sizes
from vllm_plugin_tm.quantization.support_matrix import check_machine


class TMFp4LinearKernel(TMLinearKernel):
    """e2m1 weights under byte scales; what the two formats share."""

    scale_type: str
    group: int

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """(True, None), or (False, the reason): whether this machine runs the kernel."""
        verdict = check_machine("fp4", machine.detect(), envs.schemes())
        return verdict.ok, verdict.reason

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        """As is_supported: the configuration says nothing of the layer."""
        return cls.is_supported()

    def __init__(self, config: Any) -> None:
        ok, reason = self.is_supported()
        if not ok:
            raise ValueError(f"{type(self).__name__} cannot run this layer: {reason}")
        super().__init__(config)  # type: ignore[call-arg]
        self.n = 0  # output rows: the configuration does not have them, the layer does
        selftest.require("fp4")

    @property
    def group_size(self) -> int:
        """Weights that share a scale."""
        return self.group

    @property
    def note(self) -> str:
        """Nothing: activations are kept."""
        return ""

    def disk_tensors(self, layer: torch.nn.Module) -> tuple[str, ...]:
        """Weights and their scales."""
        return (_weight_name(layer), "weight_scale")

    def output_size(self, layer: torch.nn.Module) -> int:
        """Output rows of this shard of the layer."""
        return sum(part_sizes(layer)) or self.n

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Validates the layer's disk tensors and replaces them by their kernel layout.

        Raises ValueError naming layer and tensor for a shape or dtype that does not fit, and for
        scales that are no numbers.
        """
        name, weight_name = layer_name(layer), _weight_name(layer)
        weight = getattr(layer, weight_name).data
        n, k = weight.shape[0], 2 * weight.shape[1]
        if k % self.group:
            raise ValueError(
                f"{name}.{weight_name}: expected an input size that is a multiple of {self.group}, "
                f"found {k}"
            )
        words = small_floats.e2m1_words(name, weight_name, weight, n, k)
        scale = small_floats.byte_scales(
            name,
            "weight_scale",
            layer.get_parameter("weight_scale").data,
            n,
            k // self.group,
            self.scale_type,
        )
        channels = self._channel_scale(layer, n)
        packed, scales, _ = torch.ops.vllm_plugin_tm.w4a16_pack(words, scale, None, k)
        self.n = n
        put(layer, weight_name, packed)
        put(layer, "weight_scale", scales)
        if channels is not None:
            channels = torch.nn.functional.pad(channels, (0, ops.padded(n) - n))
            put(layer, "weight_global_scale", channels)

    def apply_weights(
        self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """x [..., K] times the layer's weights plus bias [N]: [..., N] in x's dtype."""
        return torch.ops.vllm_plugin_tm.fp4_linear(
            x,
            getattr(layer, _weight_name(layer)),
            layer.weight_scale,
            getattr(layer, "weight_global_scale", None),
            bias,
            self.n,
            self.group,
            self.scale_type,
        )

    def settle_dummy(self, layer: torch.nn.Module) -> None:
        """Random scales may be no numbers, or huge: one for all."""
        one = 127 if self.scale_type == "e8m0" else 0x38
        layer.get_parameter("weight_scale").data.view(torch.uint8).fill_(one)

    def _channel_scale(self, layer: torch.nn.Module, n: int) -> Tensor | None:
        """float32 [N] that multiplies each output channel, None where there is none."""
        return None


class TMMxFp4LinearKernel(TMFp4LinearKernel, MxFp4LinearKernel):
    """32 weights share a power of two."""

    scale_type, group = "e8m0", 32


class TMNvFp4LinearKernel(TMFp4LinearKernel, NvFp4LinearKernel):
    """16 weights share an e4m3 scale, a tensor has another one of float32, which multiplies here:
    what checkpoints divide by was turned around before."""

    scale_type, group = "e4m3", 16

    def disk_tensors(self, layer: torch.nn.Module) -> tuple[str, ...]:
        """Also the scale of the tensor, as compressed-tensors and as ModelOpt call it."""
        second = "weight_scale_2" if hasattr(layer, "weight_scale_2") else "weight_global_scale"
        return (*super().disk_tensors(layer), second)

    def settle_dummy(self, layer: torch.nn.Module) -> None:
        """Also the scale of the tensor, which divides or multiplies: one."""
        super().settle_dummy(layer)
        layer.get_parameter(self.disk_tensors(layer)[-1]).data.fill_(1.0)

    def _channel_scale(self, layer: torch.nn.Module, n: int) -> Tensor | None:
        parts = part_sizes(layer) or (n,)
        scale = layer.get_parameter("weight_global_scale").data
        return small_floats.channel_scales(
            layer_name(layer), "weight_global_scale", scale, n, parts
        ).flatten()


class TMW4A4Fp4:
    """Mixed in before CompressedTensorsW4A4Fp4: each part of a fused layer keeps the scale that its
    checkpoint has for it, where upstream takes the largest for all."""

    kernel: Any

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Kernel layout, or upstream's."""
        if not isinstance(self.kernel, TMNvFp4LinearKernel):
            super().process_weights_after_loading(layer)  # type: ignore[misc]
            return
        disk = layer.get_parameter("weight_global_scale").data.float()
        name = layer_name(layer)
        if not bool((torch.isfinite(disk) & (disk > 0)).all()):
            raise ValueError(
                f"{name}.weight_global_scale: expected positive finite scales, found "
                f"{disk.flatten().tolist()}"
            )
        put(layer, "weight_global_scale", 1.0 / disk)
        self.kernel.process_weights_after_loading(layer)


def _weight_name(layer: torch.nn.Module) -> str:
    return "weight_packed" if hasattr(layer, "weight_packed") else "weight"
