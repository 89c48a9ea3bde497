# SPDX-License-Identifier: Apache-2.0
"""vLLM's side of the CUDA backend without a GPU: this process's device is "cuda", its tensors lie
in the host's memory, and the ops are those of csrc/torch/cuda_*.cpp with the simulator behind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from c_structs import Layout, Plan
from cuda_device import Device, Packed, Rounding
from sim_moe import PackedLayer, Routed, launch
from torch import Tensor

from vllm_plugin_tm import machine, selftest, selftest_moe
from vllm_plugin_tm.kernels import ops
from vllm_plugin_tm.kernels.moe_activation import Activation
from vllm_plugin_tm.quantization.support_matrix import Machine

HERE = Machine("cuda", "sm_80")


class Ops:
    """The ops by their names; tensors as the bindings have them."""

    def __init__(self, sim: Device) -> None:
        self.sim = sim
        self.counters_pass = False

    def cuda_tiles(self, device: int, out: Tensor) -> int:
        """Index, family, channels and rows of each tile."""
        tiles = self.sim.tiles_of(self.sim.wgmma)
        for row, tile in zip(out, tiles, strict=False):
            sizes = (self.sim.tile_channels(tile), self.sim.tile_rows(tile))
            row[:] = torch.tensor((tile, self.sim.wgmma, *sizes))
        return len(tiles)

    def cuda_force_tile(self, tile: int, apart: bool) -> None:
        """Until it is called with -1."""
        self.sim.library.tm_cuda_force_tile(tile, apart)

    def cuda_pass_counters(self, on: bool) -> None:
        """Whether launches keep their counters: here none does."""
        self.counters_pass = on

    def w4a16_pack(
        self,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        k: int,
        bits: int = 4,
        gate_up: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, scales, zero points."""
        packed = self.sim.pack(codes, scale, zero_point, k, bits, 4, gate_up)
        return self._shaped(packed, packed.zero)

    def w8a8_pack(
        self, weight: Tensor, scale: Tensor, gate_up: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, scales, sums of weights."""
        packed = self.sim.pack(weight, scale, None, weight.shape[1], 8, 8, gate_up)
        assert packed.sums is not None
        weight, scale, _ = self._shaped(packed, None)
        return weight, scale, packed.sums

    def _shaped(self, packed: Packed, third: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        of = packed.layout
        shapes = ops.cuda_pack_shapes(of.n, of.k, of.groups, of.bits)
        zero = (
            torch.empty(0, dtype=torch.int32, device="cpu")
            if third is None
            else third.view(shapes[2])
        )
        return packed.weight.view(shapes[0]), packed.scale.view(shapes[1]), zero

    def four_bits(self, scheme: str, launch: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The op w4a16_linear or w4a8_linear, by the device's launch of it: y [..., n]."""

        def run(
            x: Tensor,
            weight: Tensor,
            scale: Tensor,
            zero_point: Tensor | None,
            bias: Tensor | None,
            n: int,
            group_size: int,
            x_groups: bool = False,
        ) -> Tensor:
            assert not x_groups, "no CUDA kernel rounds by groups"
            packed = Packed(self._layout(x, n, group_size, 4), weight, scale, zero_point)
            return self._rows(
                scheme, x, packed, lambda rows, plan: launch(rows, packed, bias, plan)
            )

        return run

    def w8a8_linear(
        self,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        weight_sum: Tensor,
        bias: Tensor | None,
        n: int,
        x_scale: Tensor | None = None,
        x_zero_point: Tensor | None = None,
        x_symmetric: bool = True,
    ) -> Tensor:
        """y [..., n]."""
        packed = Packed(self._layout(x, n, -1, 8), weight, scale, None, weight_sum)
        rounding = Rounding(x_symmetric, x_scale, x_zero_point)

        def run(rows: Tensor, plan: Plan) -> Tensor:
            return self.sim.a8_linear(rows, packed, bias, plan, rounding)

        return self._rows("w8a8", x, packed, run)

    @staticmethod
    def _layout(x: Tensor, n: int, group_size: int, bits: int) -> Layout:
        k = x.shape[-1]
        return Layout(n, k, 1 if group_size in (-1, k) else k // group_size, bits)

    def _rows(
        self, scheme: str, x: Tensor, packed: Packed, run: Callable[[Tensor, Plan], Tensor]
    ) -> Tensor:
        n = packed.layout.n
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) == 0:
            return x.new_empty((*x.shape[:-1], n))
        y = run(rows, self.sim.plan(packed.layout, len(rows), scheme=scheme))
        return y.view(*x.shape[:-1], n)

    def moe(self, scheme: str) -> Callable[..., Tensor]:
        """The op of a scheme's experts."""
        bits = 8 if scheme == "w8a8" else 4

        def product(k: int, n: int, weight: Tensor, scale: Tensor, third: Tensor | None) -> Packed:
            rows = scale.shape[2]
            small = bits == 4 and rows == 2 * -(-k // 64) and k % 32 == 0
            layout = Layout(n, k, k // 32 if small else rows, bits)
            return Packed(layout, weight, scale, third if bits == 4 else None)

        def run(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *more: Any) -> Tensor:
            w13, w13_scale, w13_third, w13_bias, w2, w2_scale, w2_third, w2_bias = more[:8]
            intermediate, name, alpha, beta, limit, expert_map, *x_groups = more[8:]
            assert x_groups in ([], [False]), "no CUDA kernel rounds by groups"
            activation = Activation(name, alpha, beta, limit)
            channels = 2 * ops.padded(intermediate) if activation.gated else intermediate
            hidden = x.shape[1]
            layer = PackedLayer(
                product(hidden, channels, w13, w13_scale, w13_third),
                product(intermediate, hidden, w2, w2_scale, w2_third),
                w13_bias,
                w2_bias,
            )
            routing = (x.contiguous(), topk_weights.contiguous(), topk_ids.contiguous())
            routed = Routed(*routing, intermediate, activation, expert_map)
            return launch(self.sim, scheme, layer, routed)

        return run


def use_simulator(monkeypatch: pytest.MonkeyPatch, sim: Device) -> Ops:
    """Until the test ends: device "cuda", upstream's choosers on its CUDA platform, our ops."""
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    ops.load()
    made = Ops(sim)
    monkeypatch.setattr(machine, "device", lambda: "cuda")
    monkeypatch.setattr(machine, "detect", lambda: HERE)
    monkeypatch.setattr(linear, "current_platform", _Cuda(linear.current_platform, PlatformEnum))
    for module in (selftest, selftest_moe):
        monkeypatch.setattr(module, "there", lambda tensor: tensor)
    monkeypatch.setattr(selftest, "_results", {})
    names = ("w4a16_pack", "w8a8_pack", "w8a8_linear")
    replaced: dict[str, Any] = {name: getattr(made, name) for name in names}
    replaced["w4a16_linear"] = made.four_bits("w4a16", sim.w4a16_linear)
    replaced["w4a8_linear"] = made.four_bits("w4a8", sim.a8_linear)
    replaced |= {f"{scheme}_moe": made.moe(scheme) for scheme in ("w4a16", "w4a8", "w8a8")}
    replaced |= {name: getattr(made, name) for name in ("cuda_tiles", "cuda_force_tile")}
    replaced |= {"cuda_choose_tiles": sim.choose_tiles, "cuda_take_product": sim.take_product}
    replaced["cuda_pass_counters"] = made.cuda_pass_counters
    for name, op in replaced.items():
        # Some exist only where a GPU's library was built.
        monkeypatch.setattr(torch.ops.vllm_plugin_tm, name, op, raising=False)
    return made


class _Cuda:
    """vLLM's platform, as CUDA of compute capability 8.0."""

    def __init__(self, platform: Any, kinds: Any) -> None:
        self._platform, self._enum = platform, kinds.CUDA

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)

    def get_device_capability(self) -> tuple[int, int]:
        """That of an A100."""
        return 8, 0

    def is_cuda(self) -> bool:
        """Yes."""
        return True

    def is_cpu(self) -> bool:
        """No."""
        return False
