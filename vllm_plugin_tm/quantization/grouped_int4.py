# SPDX-License-Identifier: Apache-2.0
"""Grouped 4-bit weights as loaders leave them: brought to one order and validated, never unpacked.

The one order is compressed-tensors' pack-quantized: codes int32 [N, ceil(K/8)], scales [N, G], zero
points int32 [ceil(N/8), G]. GPTQ and AWQ layers reach us with K first; their parameters say so.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_plugin_tm.quantization.support_matrix import CHANNEL, normalize_group_size

CODES_PER_WORD = 8


@dataclass(frozen=True)
class GroupedInt4:
    """One layer's disk tensors in the one order; see the head of this file for the shapes."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


@dataclass(frozen=True)
class Expected:
    """What the tensors of a layer must look like. `layer` is its name, for messages."""

    layer: str
    n: int
    k: int
    group_size: int
    dtype: torch.dtype
    asymmetric: bool


def read(
    module: torch.nn.Module, expected: Expected, codes: str, scale: str, zero_point: str | None
) -> GroupedInt4:
    """The named parameters of `module` in the one order, checked against `expected`.

    Copies only what is not in that order already. Raises ValueError naming layer, tensor, the
    expected and the found value for: a missing parameter, a parameter that does not declare its
    order (a weight that was packed before), codes packed along N, a wrong shape or dtype, and
    scales that are infinite or not a number.
    """
    words = -(-expected.k // CODES_PER_WORD)
    size = normalize_group_size(expected.group_size, expected.k)
    groups = 1 if size == CHANNEL else expected.k // size
    word_rows = -(-expected.n // CODES_PER_WORD)
    # Quark pads N to whole words; the padding rows carry nothing.
    padded = word_rows * CODES_PER_WORD

    code_words = _oriented(module, codes, expected.layer, packed_along="input")
    steps = _oriented(module, scale, expected.layer, packed_along=None)
    if code_words.shape[0] == steps.shape[0] == padded:
        code_words, steps = code_words[: expected.n], steps[: expected.n]
    _check(expected.layer, codes, code_words, (expected.n, words), torch.int32)
    _check(expected.layer, scale, steps, (expected.n, groups), expected.dtype)
    _check_finite(expected.layer, scale, steps)
    if not expected.asymmetric:
        return GroupedInt4(code_words, steps, None)

    if zero_point is None:
        raise ValueError(f"{expected.layer}: an asymmetric layer needs a zero point parameter")
    zeros = _oriented(module, zero_point, expected.layer, packed_along="output")
    _check(expected.layer, zero_point, zeros, (word_rows, groups), torch.int32)
    return GroupedInt4(code_words, steps, zeros)


def _oriented(module: torch.nn.Module, name: str, layer: str, packed_along: str | None) -> Tensor:
    """The parameter's data with N first, as its `output_dim` declares it."""
    param = getattr(module, name, None)
    if param is None:
        raise ValueError(f"{layer}.{name}: the layer has no such tensor")
    output_dim = getattr(param, "output_dim", None)
    if output_dim not in (0, 1) or param.dim() != 2:
        raise ValueError(
            f"{layer}.{name}: expected a 2-D tensor in checkpoint order that declares its "
            f"output_dim (0 or 1), found shape {tuple(param.shape)} with output_dim={output_dim}. "
            "Were the weights of this layer processed already, without loading them again?"
        )
    if packed_along is not None:
        allowed = output_dim if packed_along == "output" else 1 - output_dim
        packed_dim = getattr(param, "packed_dim", None)
        if packed_dim != allowed:
            raise ValueError(
                f"{layer}.{name}: packed along dimension {packed_dim}, expected dimension "
                f"{allowed} (its {packed_along} dimension)"
            )
    data = param.data
    return (data if output_dim == 0 else data.t()).contiguous()


def _check(layer: str, name: str, data: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    if tuple(data.shape) != shape:
        raise ValueError(
            f"{layer}.{name}: expected shape {shape} in (output, input) order, "
            f"found {tuple(data.shape)}"
        )
    if data.dtype != dtype:
        raise ValueError(f"{layer}.{name}: expected dtype {dtype}, found {data.dtype}")


def _check_finite(layer: str, name: str, scale: Tensor) -> None:
    bad = ~torch.isfinite(scale)
    count = int(bad.sum())
    if count:
        row, group = (int(index) for index in bad.nonzero()[0])
        raise ValueError(
            f"{layer}.{name}: {count} of {scale.numel()} scales are infinite or not a number, the "
            f"first is {float(scale[row, group])} at output row {row}, group {group}; "
            "the checkpoint is damaged"
        )
