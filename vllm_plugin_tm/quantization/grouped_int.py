# SPDX-License-Identifier: Apache-2.0
"""Grouped integer weights as loaders leave them: brought to one order, validated, not unpacked.

The one order is compressed-tensors': codes int32 [N, ceil(K * bits / 32)] (pack-quantized) or int8
[N, K] (int-quantized), scales [N, G], zero points int32 [ceil(N * bits / 32), G]. GPTQ and AWQ
layers reach us with K first; their parameters say so.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_plugin_tm.quantization.support_matrix import (
    CHANNEL,
    WORD_BITS,
    normalize_group_size,
    split_problem,
    whole_words,
)

_BYTE_BITS = 8


@dataclass(frozen=True)
class GroupedInt:
    """One layer's disk tensors in the one order; see the head of this file for the shapes."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


@dataclass(frozen=True)
class Expected:
    """What the tensors of a layer must look like. `layer` is its name, for messages; `bits` the
    width of a code; `parts` the output sizes that the layer is fused from, empty if unknown."""

    layer: str
    n: int
    k: int
    bits: int
    group_size: int
    dtype: torch.dtype
    asymmetric: bool
    parts: tuple[int, ...] = ()

    @property
    def groups(self) -> int:
        """Scales of an output row."""
        size = normalize_group_size(self.group_size, self.k)
        return 1 if size == CHANNEL else self.k // size


def read_packed(
    module: torch.nn.Module, expected: Expected, codes: str, scale: str, zero_point: str | None
) -> GroupedInt:
    """The named parameters of `module` in the one order, checked against `expected`.

    Copies only what is not in that order already. Raises ValueError naming layer, tensor, the
    expected and the found value for: a missing parameter, a parameter that does not declare its
    order (a weight that was packed before), codes packed along N, a wrong shape or dtype, zero
    points of a fused layer whose parts share a word, and scales that are infinite or not a number.
    """
    words = -(-expected.k * expected.bits // WORD_BITS)
    word_rows = -(-expected.n * expected.bits // WORD_BITS)
    # Quark pads N to whole words; the padding rows carry nothing.
    padded = -(-expected.n // whole_words(expected.bits)) * whole_words(expected.bits)

    code_words = oriented(module, codes, expected.layer, packed_along="input")
    steps = oriented(module, scale, expected.layer)
    if code_words.shape[0] == steps.shape[0] == padded:
        code_words, steps = code_words[: expected.n], steps[: expected.n]
    check(expected.layer, codes, code_words, (expected.n, words), torch.int32)
    check(expected.layer, scale, steps, (expected.n, expected.groups), expected.dtype)
    check_finite(expected.layer, scale, steps)
    if not expected.asymmetric:
        return GroupedInt(code_words, steps, None)

    if zero_point is None:
        raise ValueError(f"{expected.layer}: an asymmetric layer needs a zero point parameter")
    zeros = oriented(module, zero_point, expected.layer, packed_along="output")
    check(expected.layer, zero_point, zeros, (word_rows, expected.groups), torch.int32)
    for part in expected.parts if len(expected.parts) > 1 else ():
        problem = split_problem(expected.bits, part, "the output size of a part of a fused layer")
        if problem:
            raise ValueError(f"{expected.layer}.{zero_point}: {problem}")
    return GroupedInt(code_words, steps, zeros)


def read_bytes(module: torch.nn.Module, expected: Expected, codes: str, scale: str) -> GroupedInt:
    """As read_packed, for symmetric codes of one signed byte each, which hold `expected.bits`.

    Raises ValueError as read_packed does, and for a code that does not fit those bits.
    """
    values = oriented(module, codes, expected.layer)
    steps = oriented(module, scale, expected.layer)
    check_parts(expected.layer, [codes, scale], (values, steps, None), expected)
    return GroupedInt(values, steps, None)


def check_parts(
    layer: str,
    names: list[str],
    parts: tuple[Tensor, Tensor, Tensor | None],
    expected: Expected,
) -> None:
    """Codes, scales and zero points that are in the one order already, against `expected`.

    `names` are theirs, for messages. Raises ValueError as read_packed and read_bytes do.
    """
    codes, scale, zero_point = parts
    if codes.dtype == torch.int8:
        check(layer, names[0], codes, (expected.n, expected.k), torch.int8)
        if expected.bits < _BYTE_BITS and not codes.is_meta:
            _check_range(layer, names[0], codes, expected.bits)
    else:
        words = -(-expected.k * expected.bits // WORD_BITS)
        check(layer, names[0], codes, (expected.n, words), torch.int32)
    check(layer, names[1], scale, (expected.n, expected.groups), expected.dtype)
    check_finite(layer, names[1], scale)
    if zero_point is not None:
        word_rows = -(-expected.n * expected.bits // WORD_BITS)
        check(layer, names[2], zero_point, (word_rows, expected.groups), torch.int32)


def _check_range(layer: str, name: str, codes: Tensor, bits: int) -> None:
    limit = 1 << (bits - 1)
    low, high = (int(value) for value in torch.aminmax(codes))
    if low < -limit or high >= limit:
        raise ValueError(
            f"{layer}.{name}: values of {low} to {high}, but {bits}-bit weights "
            f"are {-limit} to {limit - 1}"
        )


def signed_bytes(codes: Tensor, k: int) -> Tensor:
    """int8 [N, k] of packed 8-bit codes int32 [N, ceil(k/4)]: each is its byte less 128."""
    return (codes.view(torch.uint8)[:, :k] ^ 0x80).view(torch.int8)


def oriented(
    module: torch.nn.Module, name: str, layer: str, packed_along: str | None = None
) -> Tensor:
    """The parameter's data with N first, as its `output_dim` declares it.

    `packed_along`: "input" or "output", the dimension along which it must declare to be packed.
    Raises ValueError naming layer and tensor.
    """
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


def check(layer: str, name: str, data: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises ValueError naming layer and tensor for another shape or dtype."""
    if tuple(data.shape) != shape:
        raise ValueError(
            f"{layer}.{name}: expected shape {shape} in (output, input) order, "
            f"found {tuple(data.shape)}"
        )
    if data.dtype != dtype:
        raise ValueError(f"{layer}.{name}: expected dtype {dtype}, found {data.dtype}")


def check_finite(layer: str, name: str, scale: Tensor) -> None:
    """Raises ValueError naming layer, tensor and place for scales [N, G] that are no numbers."""
    # One pass and no mask: the extremes are no numbers where one of the values is none.
    whole = scale.numel() and scale.dtype.itemsize > 1
    if whole and all(torch.isfinite(extreme) for extreme in torch.aminmax(scale)):
        return
    bad = ~torch.isfinite(scale)
    count = int(bad.sum())
    if count:
        row, group = (int(index) for index in bad.nonzero()[0])
        raise ValueError(
            f"{layer}.{name}: {count} of {scale.numel()} scales are infinite or not a number, the "
            f"first is {float(scale[row, group])} at output row {row}, group {group}; "
            "the checkpoint is damaged"
        )
