# SPDX-License-Identifier: Apache-2.0
"""Routed experts that are quantized when the layer's weights have arrived."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.model_executor.model_loader.reload.layerwise import initialize_online_processing
from vllm.model_executor.utils import set_weight_attrs

from vllm_plugin_tm.quantization.convert.plan import indivisible
from vllm_plugin_tm.quantization.convert.run import unit_rows
from vllm_plugin_tm.quantization.online.arrivals import Piece, keeping, pieces_of
from vllm_plugin_tm.quantization.online.fill import fill
from vllm_plugin_tm.quantization.online.linear import DONE, refuse_cut
from vllm_plugin_tm.quantization.online.options import KEY, OnlineError

if TYPE_CHECKING:
    from vllm_plugin_tm.quantization.online.config import TMOnlineConfig

_WEIGHTS = ("w13", "w2")


class _OnlineExperts:
    """Mixed in before the live class of a method for compressed-tensors experts, which creates,
    processes and runs what a checkpoint of the scheme would have held."""

    uses_meta_device = True
    tm_online: "TMOnlineConfig"
    tm_prefix: str

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Registers `w13_weight` [E, N, H] and `w2_weight` [E, H, I] on the meta device. Raises
        OnlineError for experts that blocks do not fit or shards would cut, and what upstream
        raises for experts that it would not load."""
        self._refuse_misfits(hidden_size, intermediate_size_per_partition)
        sizes = (num_experts, hidden_size, intermediate_size_per_partition, params_dtype)
        self._arguments, self._attributes = sizes, extra_weight_attrs
        with torch.device("meta"):
            rehearsal: Any = torch.nn.Module()
            super().create_weights(rehearsal, *sizes, **extra_weight_attrs)  # type: ignore[misc]
        shards = self.moe.w13_num_shards  # type: ignore[attr-defined]
        shapes = {
            "w13_weight": (shards * intermediate_size_per_partition, hidden_size),
            "w2_weight": (hidden_size, intermediate_size_per_partition),
        }
        layer.num_experts, layer.orig_dtype = num_experts, params_dtype
        for name, shape in shapes.items():
            data = torch.empty((num_experts, *shape), device="meta", dtype=params_dtype)
            weight = torch.nn.Parameter(data, requires_grad=False)
            layer.register_parameter(name, weight)
            # Packed weights are loaded in another order than plain ones by some formats.
            plain = {k: v for k, v in extra_weight_attrs.items() if k != "is_transposed"}
            plain["weight_loader"] = keeping(plain["weight_loader"])
            set_weight_attrs(weight, plain)
        initialize_online_processing(layer)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Quantizes expert by expert, then has upstream's method process what comes of it."""
        if getattr(layer, DONE, False):
            return
        weights = {name: layer._parameters.pop(f"{name}_weight") for name in _WEIGHTS}
        super().create_weights(layer, *self._arguments, **self._attributes)  # type: ignore[misc]
        options = self.tm_online.options
        split = self.moe.moe_parallel_config.tp_size > 1  # type: ignore[attr-defined]
        params = dict(layer.named_parameters(recurse=False))
        for name in _WEIGHTS:
            parts = {
                key.removeprefix(f"{name}_"): param.data
                for key, param in params.items()
                if key.startswith(f"{name}_")
            }
            weight = weights.pop(name)
            for expert, pieces in enumerate(_by_expert(weight, unit_rows(options))):
                own = {key: data[expert] for key, data in parts.items() if data.numel()}
                scale_dtype = self.tm_online.scale_dtype(weight.dtype)
                group, whole_rows = options.weight_group, not split or name == "w13"
                where = f"{self.tm_prefix}.{expert} ({name})"
                fill(own, pieces, group, options, scale_dtype, split=not whole_rows, layer=where)
        super().process_weights_after_loading(layer)  # type: ignore[misc]
        setattr(layer, DONE, True)

    def _refuse_misfits(self, hidden: int, part: int) -> None:
        options = self.tm_online.options
        if not options.blocks:
            return  # the support matrix knows about groups
        full = self.moe.intermediate_size  # type: ignore[attr-defined]
        for rows, columns in ((full, hidden), (hidden, full)):
            problem = indivisible(rows, columns, options)
            if problem is not None:
                raise OnlineError(
                    f"{self.tm_prefix}, a matrix of {rows} x {columns}: {problem}; a smaller block "
                    f"size may fit, {KEY}.ignore leaves the experts as they are"
                )
        refuse_cut(self.tm_prefix, "inner", full, part, options)


def _by_expert(weight: Tensor, unit: int) -> list[list[Piece]]:
    """The pieces of each expert of a weight [E, N, K], whose rows count from its first."""
    experts, n, _ = weight.shape
    parts: list[list[Piece]] = [[] for _ in range(experts)]
    for row, tensor in pieces_of(weight, unit):
        while len(tensor):
            expert, first = divmod(row, n)
            parts[expert].append((first, tensor[: n - first]))
            row, tensor = row + n - first, tensor[n - first :]
    return parts


_made: dict[type, type] = {}


def online_experts(method: Any, config: "TMOnlineConfig", prefix: str) -> Any:
    """Upstream's method for compressed-tensors experts, made to quantize what it is given."""
    live = type(method)
    if live not in _made:
        # The loader compares the name of a method's class.
        _made[live] = type(live.__name__, (_OnlineExperts, live), {"__module__": __name__})
    method.__class__ = _made[live]
    method.tm_online, method.tm_prefix = config, prefix
    return method
