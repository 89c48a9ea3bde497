# SPDX-License-Identifier: Apache-2.0
"""Routed experts whose weights are floats of 8 or 4 bits: disk tensors to kernel layout, expert by
expert; the op call is that of all experts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_plugin_tm.kernels.moe_activation import Activation
from vllm_plugin_tm.quantization import small_floats
from vllm_plugin_tm.quantization.experts_kernel import (
    Names,
    TMExpertsKernel,
    pack_experts,
    packed_channels,
)
from vllm_plugin_tm.quantization.kernel import put
from vllm_plugin_tm.quantization.load_check import KERNEL_LAYOUT
from vllm_plugin_tm.quantization.support_matrix import CHANNEL, MoeRequest

_X_SCALE = "input_scale"


@dataclass(frozen=True)
class FloatFormat:
    """How a checkpoint holds experts.

    `blocks` are the shapes that FP8 blocks may have, empty for scales of tensors or channels;
    `rounding` is the op's word for activations, `x_group_size` the neighbours that share a scale
    where it is "group". `group` and `scale_type` are those of FP4. `tensor_scale` names another
    float32 scale that each matrix has, "" where it has none; it multiplies, or `divides`.
    `interleaved`: gate and up rows alternate.
    """

    blocks: tuple[tuple[int, int], ...] = ()
    rounding: str = "none"
    x_group_size: int = -1
    group: int = CHANNEL
    scale_type: str = "e8m0"
    tensor_scale: str = ""
    divides: bool = False
    interleaved: bool = False


class TMFloatExpertsKernel(TMExpertsKernel):
    """All routed experts of a layer in this shard. After processing the parameters that held
    weights and scales hold them in kernel layout, [experts, ...] each."""

    def __init__(
        self, request: MoeRequest, activation: Activation, names: Names, form: FloatFormat
    ) -> None:
        super().__init__(request, activation, names)
        self.form = form
        self._intermediate = request.intermediate

    @property
    def group_size(self) -> int:
        """Inputs that share a scale, CHANNEL for all."""
        return self.form.blocks[0][1] if self.form.blocks else self.form.group

    @property
    def note(self) -> str:
        """How activations are rounded; empty where they are kept."""
        return {
            "none": "",
            "token": "FP8 activations, per token",
            "group": "FP8 activations, per token and group",
            "tensor": "FP8 activations, static",
        }[self.form.rounding]

    @property
    def intermediate(self) -> int:
        """As the layer has it, which may be more than the model's: whole groups."""
        return self._intermediate

    def settle_dummy(self, layer: torch.nn.Module) -> None:
        """Random bytes and scales may be no numbers, or huge."""
        for product in ("w13", "w2"):
            weight = layer.get_parameter(f"{product}_{self.names.weight}").data
            scale = layer.get_parameter(f"{product}_{self.names.scale}").data
            if self.request.scheme == "fp8":
                weight.view(torch.uint8).bitwise_and_(0xBF)  # without the largest exponents
                scale.fill_(0.01)
            else:
                one = 127 if self.form.scale_type == "e8m0" else 0x38
                scale.view(torch.uint8).fill_(one - 5 if one == 127 else one)
            for name in (self.form.tensor_scale, _X_SCALE):
                if name and getattr(layer, f"{product}_{name}", None) is not None:
                    layer.get_parameter(f"{product}_{name}").data.fill_(1.0)

    def process(self, layer: torch.nn.Module) -> None:
        """Validates the layer's disk tensors and replaces them by their kernel layout. Memory grows
        by one expert: what an expert took on disk is given back when it is packed.

        Raises ValueError naming layer, expert and tensor for whatever does not fit the request.
        """
        # Everything is looked at and refused before anything is replaced.
        products = {product: self._checked(layer, product) for product in ("w13", "w2")}
        for product, (read, disk) in products.items():
            self._pack_product_floats(layer, product, read, disk)

    @property
    def _third(self) -> str | None:
        return self.form.tensor_scale or None

    def _disk_names(self) -> list[str]:
        names = [self.names.weight, self.names.scale]
        names += [self.form.tensor_scale] if self.form.tensor_scale else []
        return names + ([_X_SCALE] if self.form.rounding == "tensor" else [])

    def _more_arguments(self, layer: torch.nn.Module) -> tuple[object, ...]:
        if self.request.scheme == "fp4":
            return (self.form.scale_type,)
        static = self.form.rounding == "tensor"
        scales = [getattr(layer, f"{w}_{_X_SCALE}") if static else None for w in ("w13", "w2")]
        return (self.form.rounding, *scales, self.form.x_group_size)

    def _checked(
        self, layer: torch.nn.Module, product: str
    ) -> tuple[Callable[[int], tuple[Tensor, Tensor]], list[Tensor]]:
        """A function that gives an expert's codes and scales as the packer takes them, and the disk
        tensors that it reads. Every expert has been read once."""
        name = str(getattr(layer, "layer_name", type(layer).__name__))
        weight, scale = (
            layer.get_parameter(f"{product}_{part}")
            for part in (self.names.weight, self.names.scale)
        )
        for tensor, part in ((weight, self.names.weight), (scale, self.names.scale)):
            if getattr(tensor, KERNEL_LAYOUT, False):
                raise ValueError(
                    f"{name}.{product}_{part}: expected a tensor in checkpoint order, found one in "
                    "kernel layout. Were the weights of this layer processed already, without "
                    "loading them again?"
                )
        per_byte = 2 if self.request.scheme == "fp4" else 1
        n, k = weight.shape[1], weight.shape[2] * per_byte
        halves = 2 if product == "w13" and self.activation.gated else 1
        if product == "w2":
            self._intermediate = k

        def read(expert: int) -> tuple[Tensor, Tensor]:
            label = f"{name}, expert {expert}"
            codes, steps = weight.data[expert], scale.data[expert]
            if self.request.scheme == "fp8":
                codes = small_floats.e4m3_bytes(
                    label, f"{product}_{self.names.weight}", codes, n, k
                )
                steps = self._fp8_scales(
                    label, f"{product}_{self.names.scale}", steps, n, k, halves
                )
                return codes, steps
            if self.form.interleaved and halves == 2:
                codes, steps = _gates_first(codes), _gates_first(steps)
            codes = small_floats.e2m1_words(label, f"{product}_{self.names.weight}", codes, n, k)
            steps = small_floats.byte_scales(
                label,
                f"{product}_{self.names.scale}",
                steps,
                n,
                k // self.form.group,
                self.form.scale_type,
            )
            return codes, steps

        for expert in range(len(weight)):
            read(expert)
        if self.form.tensor_scale:
            second = f"{product}_{self.form.tensor_scale}"
            _positive(name, second, layer.get_parameter(second).data)
        if self.form.rounding == "tensor":
            disk = getattr(layer, f"{product}_{_X_SCALE}", None)
            small_floats.one_scale(name, f"{product}_{_X_SCALE}", disk)
        return read, [weight.data, scale.data]

    def _fp8_scales(
        self, label: str, name: str, scale: Tensor, n: int, k: int, halves: int
    ) -> Tensor:
        if not self.form.blocks:
            return small_floats.channel_scales(label, name, scale, n, (n // halves,) * halves)
        for block in self.form.blocks:
            if tuple(scale.shape) == (-(-n // block[0]), -(-k // block[1])):
                break
        return small_floats.block_scales(label, name, scale, n, k, block)

    def _pack_product_floats(
        self,
        layer: torch.nn.Module,
        product: str,
        read: Callable[[int], tuple[Tensor, Tensor]],
        disk: list[Tensor],
    ) -> None:
        gate_up = product == "w13" and self.activation.gated
        namespace = torch.ops.vllm_plugin_tm
        pack = namespace.w8a16_pack if self.request.scheme == "fp8" else namespace.w4a16_pack
        bits = 8 if self.request.scheme == "fp8" else 4
        n, k = disk[0].shape[1], disk[0].shape[2] * 8 // bits

        def one(expert: int) -> tuple[Tensor, ...]:
            return pack(*read(expert), None, k, bits, gate_up)[:2]

        bias = getattr(layer, f"{product}_bias", None)
        if bias is not None:
            values = (
                _gates_first(bias.data.t()).t() if gate_up and self.form.interleaved else bias.data
            )
            put(layer, f"{product}_bias", packed_channels(values, gate_up))
        if self.form.tensor_scale:
            second = f"{product}_{self.form.tensor_scale}"
            scale = layer.get_parameter(second).data.float()
            scale = (1.0 / scale if self.form.divides else scale).reshape(len(scale), -1)
            rows = scale.repeat_interleave(n // scale.shape[1], dim=1)
            put(layer, second, packed_channels(rows, gate_up))
        if self.form.rounding == "tensor":
            name = f"{product}_{_X_SCALE}"
            put(layer, name, small_floats.one_scale("", name, getattr(layer, name)))
        weight, scale = pack_experts(one, disk)
        put(layer, f"{product}_{self.names.weight}", weight)
        put(layer, f"{product}_{self.names.scale}", scale)


def _gates_first(rows: Tensor) -> Tensor:
    """[2 I, ...] whose rows are gate and up in turn, as gates and then ups."""
    return torch.cat((rows[0::2], rows[1::2]))


def _positive(layer: str, name: str, scale: Tensor) -> None:
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(
            f"{layer}.{name}: expected positive finite scales, found {scale.flatten().tolist()}"
        )
