# SPDX-License-Identifier: Apache-2.0
"""From a loaded weight to the disk tensors of a compressed-tensors layer: the converter's bits."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vllm_plugin_tm.quantization.convert.options import Options
from vllm_plugin_tm.quantization.convert.rounding import NotFiniteError, Reduce
from vllm_plugin_tm.quantization.convert.run import (
    PIECE_WEIGHTS,
    quantize,
    rows_of_one,
    unit_rows,
)
from vllm_plugin_tm.quantization.online.arrivals import Piece
from vllm_plugin_tm.quantization.online.options import KEY, OnlineError
from vllm_plugin_tm.quantization.support_matrix import CHANNEL


def fill(
    tensors: Mapping[str, Tensor],
    pieces: Sequence[Piece],
    group_size: int,
    options: Options,
    scale_dtype: torch.dtype,
    *,
    split: bool,
    layer: str,
) -> None:
    """Quantizes the pieces of a weight [N, K] into a layer's tensors of the format's names:
    weight_packed or weight, weight_scale, weight_zero_point, weight_shape.

    The pieces are all of it, in the order of rows; where blocks of rows share a scale, each begins
    with one. `split`: the weight is a part of rows that other ranks have the rest of; scales of
    whole rows then come from all parts. Raises OnlineError naming `layer` for weights that are no
    finite numbers.
    """
    unit = unit_rows(options)
    reduce = _over_ranks(options) if split and group_size == CHANNEL else None
    n = 0
    for first, rows in pieces:
        k = rows.shape[1]
        step = max(PIECE_WEIGHTS // k // unit, 1) * unit
        for row in range(first, first + len(rows), step):
            part = rows[row - first : row - first + step]
            try:
                made = quantize(part, group_size, options, scale_dtype, reduce)
            except NotFiniteError as error:
                text = error.text(f"{layer}: the weight", row, " of this shard")
                raise OnlineError(text) from None
            for name, data in made.items():
                at = row // rows_of_one(name, group_size, options)
                tensors[name][at : at + len(data)].copy_(data)
        n += len(rows)
    if "weight_shape" in tensors:
        tensors["weight_shape"].copy_(torch.tensor([n, k]))


def _over_ranks(options: Options) -> Reduce:
    """Extremes of whole rows, from those of each rank's part of them."""
    if options.method == "mse":
        raise OnlineError(
            f"{KEY}.method 'mse' with one scale per output channel looks at whole rows, which "
            "--tensor-parallel-size splits; allowed are rtn and signed"
        )
    from vllm.distributed import get_tp_group

    def reduce(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        both, ranks = torch.stack([-low, high]), get_tp_group()
        group = ranks.cpu_group if both.is_cpu else ranks.device_group
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX, group=group)
        return -both[0], both[1]

    return reduce
