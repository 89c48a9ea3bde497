# SPDX-License-Identifier: Apache-2.0
"""A weight that is quantized is never laid out in 16 bits: what would be copied into it is kept,
most often as views of a mapped file, and quantized from where it lies.

Writing memory for the first time is what loading is slow at; docs/online.md has the figures.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Piece = tuple[int, Tensor]
"""The first row in a weight, and the rows [rows, K] from there on."""

_KEPT = "tm_arrived"


def keeping(loader: Callable[..., Any]) -> Callable[..., Any]:
    """A weight loader for upstream that notes what `loader` copies where, instead of copying.

    A parameter without memory (meta device) is loaded by `loader` itself, which upstream counts.
    """

    @wraps(loader)
    def keep(param: Tensor, *args: Any, **kwargs: Any) -> Any:
        if param.is_meta:
            return loader(param, *args, **kwargs)
        with _Copies(param):
            return loader(param, *args, **kwargs)

    return keep


def pieces_of(param: Tensor, unit: int) -> list[Piece]:
    """What arrived for a parameter [..., N, K], seen as [rows, K], in the order of rows.

    Each of its rows is in one of the pieces, and each piece begins with a multiple of `unit` rows:
    where those that were kept are no such pieces, they are copied into the parameter, which is
    then the only one.
    """
    whole = param.data.view(-1, param.shape[-1])
    kept: list[Piece] = vars(param).pop(_KEPT, [])
    pieces = sorted(kept, key=lambda piece: piece[0])
    end = 0
    for row, tensor in pieces:
        if row != end or row % unit:
            break
        end = row + len(tensor)
    else:
        if end == len(whole):
            return pieces
    _copy(kept, whole)
    return [(0, whole)]


def _copy(pieces: list[Piece], whole: Tensor) -> None:
    for row, tensor in pieces:
        whole[row : row + len(tensor)].copy_(tensor)


class _Copies(TorchFunctionMode):
    """Keeps the sources of copies into whole rows of a parameter; other copies are done."""

    def __init__(self, param: Tensor) -> None:
        super().__init__()
        self._whole = param.data.view(-1, param.shape[-1])
        self._kept: list[Piece] = vars(param).setdefault(_KEPT, [])

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.copy_:
            target, source = args[:2]
            if self._takes(target, source):
                row = target.storage_offset() // target.shape[-1]
                for matrix in source.flatten(0, -3) if source.dim() > 2 else (source,):
                    self._kept.append((row, matrix))
                    row += len(matrix)
                return target
            # What comes now must not be overwritten by what came before.
            _copy(self._kept, self._whole)
            self._kept.clear()
        return func(*args, **(kwargs or {}))

    def _takes(self, target: Tensor, source: Tensor) -> bool:
        same_memory = target.untyped_storage().data_ptr() == self._whole.data_ptr()
        rows = target.dim() >= 2 and target.shape[-1] == self._whole.shape[-1]
        as_it_is = (target.shape, target.dtype, target.device) == (
            source.shape,
            source.dtype,
            source.device,
        )
        return same_memory and rows and as_it_is and target.is_contiguous()
