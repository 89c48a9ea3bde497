# SPDX-License-Identifier: Apache-2.0
"""Routed experts: disk tensors to kernel layout, expert by expert, and one op call a layer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_plugin_tm import machine, selftest
from vllm_plugin_tm.kernels import ops
from vllm_plugin_tm.kernels.moe_activation import Activation
from vllm_plugin_tm.quantization import grouped_int
from vllm_plugin_tm.quantization.kernel import TMKernel, put
from vllm_plugin_tm.quantization.load_check import KERNEL_LAYOUT, Layer
from vllm_plugin_tm.quantization.support_matrix import (
    WEIGHT_TYPES,
    WORD_BITS,
    MoeRequest,
    normalize_group_size,
)


@dataclass(frozen=True)
class Names:
    """What a method calls the parameters of a product, after "w13_" or "w2_": codes, scales, and
    zero points (None: the method has none). `k_first`: they are [experts, input, output].

    `reorder`, where words hold an expert's codes and zero points along the output and in an order
    of their own: makes signed codes int8 [output, input] and packed zero points of them.
    """

    weight: str
    scale: str
    zero_point: str | None = None
    k_first: bool = False
    reorder: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]] | None = None


@dataclass(frozen=True)
class Disk:
    """One expert's tensors of a product in the one order of `grouped_int`."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


class TMExpertsKernel(TMKernel):
    """All routed experts of a layer in this shard.

    After processing, the parameters that held weights, scales and zero points hold them in kernel
    layout, [experts, ...] each; `{w13,w2}_weight_sum` stands beside int8 weights, and biases are
    float32 in the order of the packed channels.
    """

    def __init__(
        self, request: MoeRequest, activation: Activation, names: Names, x_groups: bool = False
    ) -> None:
        self.request = request
        self.activation = activation
        self.names = names
        self.x_groups = x_groups
        self.bits = WEIGHT_TYPES[request.weight_type].bits
        # A kernel that computes wrongly here must never see a weight.
        selftest.require(f"{request.scheme}_moe")

    @property
    def group_size(self) -> int:
        """Weights that share a scale, CHANNEL for all of an output channel."""
        return normalize_group_size(self.request.group_size, self.request.hidden)

    @property
    def note(self) -> str:
        """How activations are rounded; empty where they are kept."""
        if self.request.scheme.endswith("a16"):
            return ""
        return f"int8 activations, per token{' and group' if self.x_groups else ''}"

    def loaded(
        self, name: str, module: torch.nn.Module, fused_from: tuple[str, ...]
    ) -> list[Layer]:
        """The two products; a checkpoint has gates, ups and downs of each expert."""
        prefix = str(getattr(module, "layer_name", name))
        ups = [module.ckpt_gate_proj_name]
        if self.activation.gated:
            ups.append(module.ckpt_up_proj_name)
        parts = {
            "w13": [(up, self.request.intermediate) for up in ups],
            "w2": [(module.ckpt_down_proj_name, self.request.hidden)],
        }
        return [
            Layer(
                name,
                module,
                tuple(f"{product}_{tensor}" for tensor in self._disk_names()),
                tuple(
                    (f"{prefix}.{expert}.{part}", rows)
                    for expert in _local_experts(module)
                    for part, rows in parts[product]
                ),
                prefix=f"{product}_",
                rows_last=self.names.k_first,
            )
            for product in parts
        ]

    def _disk_names(self) -> list[str]:
        """What a checkpoint must fill of each product."""
        names = [self.names.weight, self.names.scale]
        if self.request.zero_points and self.names.zero_point:
            names.append(self.names.zero_point)
        return names

    def settle_dummy(self, layer: torch.nn.Module) -> None:
        """Random bytes are no 4-bit weights."""
        if WEIGHT_TYPES[self.request.weight_type].packed or self.bits == 8:
            return
        limit = 1 << (self.bits - 1)
        for product in ("w13", "w2"):
            getattr(layer, f"{product}_{self.names.weight}").data.clamp_(-limit, limit - 1)

    def process(self, layer: torch.nn.Module) -> None:
        """Validates the layer's disk tensors and replaces them by their kernel layout. Memory grows
        by one expert: what an expert took on disk is given back when it is packed.

        Raises ValueError naming layer, expert and tensor for whatever does not fit the request.
        """
        checked = []
        # Everything is looked at and refused before anything is replaced.
        for product, wanted in self.request.products().items():
            gate_up = product == "w13" and self.activation.gated
            rows = 2 * self.request.intermediate if gate_up else wanted.n
            expected = grouped_int.Expected(
                layer=str(getattr(layer, "layer_name", type(layer).__name__)),
                n=rows,
                k=wanted.k,
                bits=self.bits,
                group_size=self.request.group_size,
                dtype=_scale_dtype(self.request, layer, product, self.names),
                asymmetric=self.request.zero_points,
            )
            checked.append((product, expected, gate_up, self._disk(layer, product, expected)))
        for product, expected, gate_up, disk in checked:
            self._pack_product(layer, product, expected, gate_up, disk)

    def apply(
        self, layer: torch.nn.Module, x: Tensor, topk_weights: Tensor, topk_ids: Tensor
    ) -> Tensor:
        """x [T, H] through the experts topk_ids [T, top_k], summed with topk_weights: [T, H]."""
        # Depends on the configuration only: nothing here may depend on x (see torch.compile).
        topk_weights = topk_weights.float()  # custom routing functions may use x's dtype
        if layer.apply_router_weight_on_input:
            x = x * topk_weights.to(x.dtype)
            topk_weights = torch.ones_like(topk_weights)
        weights = [
            getattr(layer, f"{product}_{name}", None) if name else None
            for product in ("w13", "w2")
            for name in (self.names.weight, self.names.scale, self._third, "bias")
        ]
        a = self.activation
        arguments = (
            *(x, topk_weights, topk_ids, *weights),
            *(self.intermediate, a.name, a.alpha, a.beta, a.limit, layer.expert_map),
        )
        op = getattr(torch.ops.vllm_plugin_tm, f"{self.request.scheme}_moe")
        return op(*arguments, *self._more_arguments(layer))

    @property
    def intermediate(self) -> int:
        """Size of what stands between the products."""
        return self.request.intermediate

    def _more_arguments(self, layer: torch.nn.Module) -> tuple[object, ...]:
        """What the scheme's op takes beyond those that all have."""
        return (self.x_groups,) if self.request.scheme == "w4a8" else ()

    @property
    def _third(self) -> str | None:
        """The parameter beside weights and scales, None where there is none."""
        if self.request.scheme == "w8a8":
            return "weight_sum"
        return self.names.zero_point if self.request.zero_points else None

    def _disk(
        self, layer: torch.nn.Module, product: str, expected: grouped_int.Expected
    ) -> dict[str, Tensor]:
        """A product's parameters, each expert's checked: codes, scales, zero points."""
        names = [self.names.weight, self.names.scale]
        if expected.asymmetric:
            assert self.names.zero_point is not None
            names.append(self.names.zero_point)
        disk = {name: getattr(layer, f"{product}_{name}") for name in names}
        for name, tensor in disk.items():
            if getattr(tensor, KERNEL_LAYOUT, False):
                raise ValueError(
                    f"{expected.layer}.{product}_{name}: expected a tensor in checkpoint order, "
                    "found one in kernel layout. Were the weights of this layer processed already, "
                    "without loading them again?"
                )
        labels = [f"{product}_{name}" for name in disk]
        for expert in range(len(disk[self.names.weight])):
            label = f"{expected.layer}, expert {expert}"
            grouped_int.check_parts(label, labels, self._parts(disk, expert, False), expected)
        return disk

    def _pack_product(
        self,
        layer: torch.nn.Module,
        product: str,
        expected: grouped_int.Expected,
        gate_up: bool,
        disk: dict[str, Tensor],
    ) -> None:
        bias = getattr(layer, f"{product}_bias", None)
        if bias is not None:
            put(layer, f"{product}_bias", packed_channels(bias.data, gate_up))
        pack = self._packer(expected, gate_up)

        def one(expert: int) -> tuple[Tensor, ...]:
            codes, scale, zero_point = self._parts(disk, expert, True)
            zero_point = None if zero_point is None else zero_point.contiguous()
            return pack(Disk(codes.contiguous(), scale.contiguous(), zero_point))

        out = pack_experts(one, list(disk.values()))
        put(layer, f"{product}_{self.names.weight}", out[0])
        put(layer, f"{product}_{self.names.scale}", out[1])
        if self._third is not None:
            put(layer, f"{product}_{self._third}", out[2])
        elif self.names.zero_point is not None and hasattr(
            layer, f"{product}_{self.names.zero_point}"
        ):
            # Symmetric GPTQ checkpoints carry zero points that are the middle code everywhere.
            setattr(layer, f"{product}_{self.names.zero_point}", None)

    def _packer(
        self, expected: grouped_int.Expected, gate_up: bool
    ) -> Callable[[Disk], tuple[Tensor, ...]]:
        namespace = torch.ops.vllm_plugin_tm
        if self.request.scheme == "w8a8":
            return lambda disk: namespace.w8a8_pack(disk.codes, disk.scale, gate_up)
        pack = namespace.w8a16_pack if self.request.scheme == "w8a16" else namespace.w4a16_pack
        return lambda disk: pack(
            disk.codes, disk.scale, disk.zero_point, expected.k, expected.bits, gate_up
        )

    def _parts(
        self, disk: dict[str, Tensor], expert: int, wanted: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One expert's codes, scales and zero points, outputs first; views where nothing needs
        another order. Not `wanted`: only shapes, dtypes and scales will be looked at."""
        codes, scale, *rest = (tensor.data[expert] for tensor in disk.values())
        zero_point = rest[0] if rest else None
        if not self.names.k_first:
            return codes, scale, zero_point
        if self.names.reorder is None:
            return codes.t(), scale.t(), None if zero_point is None else zero_point.t()
        if wanted:
            codes, zero_point = self.names.reorder(codes, zero_point)
            return codes, scale.t(), zero_point
        # The shapes that another order will have, without moving anything.
        shape = (codes.shape[1] * (WORD_BITS // self.bits), codes.shape[0])
        codes = torch.empty(shape, dtype=torch.int8, device="meta")
        return codes, scale.t(), None if zero_point is None else zero_point.t()


def pack_experts(
    pack: Callable[[int], tuple[Tensor, ...]], disk: list[Tensor]
) -> tuple[Tensor, ...]:
    """What `pack` makes of each expert, [experts, ...]; `disk` are the tensors [experts, ...] that
    it reads, whose memory is given back expert by expert."""
    experts = len(disk[0])
    out: tuple[Tensor, ...] = ()
    for expert in range(experts):
        packed = pack(expert)
        if not out:
            out = tuple(part.new_empty((experts, *part.shape)) for part in packed)
            for part in out:
                ops.advise_huge_pages(part)
        for part, whole in zip(packed, out, strict=True):
            whole[expert].copy_(part)
        for tensor in disk:
            ops.release_pages(tensor.data[expert])
    return out


def _local_experts(module: torch.nn.Module) -> list[int]:
    """Global numbers of the experts whose weights are here, in the order of the weights."""
    expert_map = getattr(module, "expert_map", None)
    if expert_map is None:
        return list(range(int(module.local_num_experts)))  # type: ignore[arg-type]
    local = [(int(at), expert) for expert, at in enumerate(expert_map.tolist()) if at >= 0]
    return [expert for _, expert in sorted(local)]


def _scale_dtype(
    request: MoeRequest, layer: torch.nn.Module, product: str, names: Names
) -> torch.dtype:
    """Kept activations need scales of their dtype; with integers upstream chooses it."""
    if request.scheme.endswith("a16"):
        return getattr(torch, request.act_dtype)
    return getattr(layer, f"{product}_{names.scale}").dtype


def packed_channels(values: Tensor, gate_up: bool) -> Tensor:
    """One value of each output row, [experts, N], as float32 [experts, padded channels] in the
    order of packed channels: tiles of gates and ups alternate. The channels are those of the
    layout of this process's device."""
    experts = values.shape[0]
    halves = values.float().reshape(experts, 2 if gate_up else 1, -1)
    channels = ops.padded(halves.shape[2])
    halves = torch.nn.functional.pad(halves, (0, channels - halves.shape[2]))
    tiles = halves.view(experts, halves.shape[1], -1, ops.TILE_N)
    out = tiles.transpose(1, 2).reshape(experts, -1)
    if machine.device() == "cuda":
        whole = ops.padded(out.shape[1], ops.CUDA_TILE)
        out = torch.nn.functional.pad(out, (0, whole - out.shape[1]))
    return out.contiguous()
