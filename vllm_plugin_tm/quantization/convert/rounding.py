# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of quantizing weights: float32 against the scale as it will be stored.

Knows no file and no name. Every function takes whole rows and gives the same bits for a row
whatever rows stand beside it, so a matrix may be cut into rows anywhere (into blocks of rows for
FP8 blocks). Converter and loader share it: their codes are equal.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_plugin_tm.quantization.support_matrix import CHANNEL

FP8 = torch.float8_e4m3fn
FP8_MAX = float(torch.finfo(FP8).max)

# Ranges that "mse" tries, as parts of the whole: below 0.6 nothing is gained for any weights seen.
_SHRINK = tuple(1 - step / 40 for step in range(17))


@dataclass(frozen=True)
class Rounding:
    """How integers are made: `bits` of a code, `group_size` along K or CHANNEL, whether the range
    is symmetric, the `method` ("rtn", "signed", "mse"), what "mse" weighs errors with ("none",
    "square")."""

    bits: int
    group_size: int
    symmetric: bool = True
    method: str = "rtn"
    mse_weight: str = "none"

    @property
    def low(self) -> int:
        """The lowest code."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """The highest code."""
        return (1 << (self.bits - 1)) - 1


Reduce = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From the least and largest weights of parts of groups to those of whole groups."""


def quantize_int(
    weight: Tensor,
    rounding: Rounding,
    scale_dtype: torch.dtype,
    reduce: Reduce | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points of a matrix.

    Args:
        weight: floating [N, K]; the group size divides K. Finite: see check_finite.
        rounding: how.
        scale_dtype: what the scales are stored in, and so computed with.
        reduce: where the groups are parts of larger ones, what makes theirs of these extremes.

    Returns:
        Codes int8 [N, K]; scales [N, G]; zero points int8 [N, G] or None where symmetric. The
        weight is (code - zero point) * scale. Groups of one value are exact.
    """
    n, k = weight.shape
    size = k if rounding.group_size == CHANNEL else rounding.group_size
    groups = weight.float().view(n, k // size, size)
    low, high = groups.amin(-1), groups.amax(-1)
    if reduce is not None:
        low, high = reduce(low, high)
    if rounding.method == "mse":
        scale, zero = _searched(groups, low, high, rounding, scale_dtype)
    else:
        scale, zero = _from_range(low, high, rounding, scale_dtype)
    # One value throughout: code 1 or -1 of that value itself is exact, any range's step is not.
    constant = low == high
    magnitude = low.abs().to(scale_dtype)
    scale = torch.where(constant & (magnitude != 0), magnitude, scale)
    # All zeros, or too small for the scale's type: every code is zero and the scale has no say.
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    if zero is not None:
        zero = torch.where(constant, torch.zeros_like(zero), zero)
    codes = _codes(groups, scale.float(), zero, rounding)
    points = None if zero is None else zero.to(torch.int8)
    return codes.to(torch.int8).view(n, k), scale, points


def quantize_fp8(
    weight: Tensor,
    scale_dtype: torch.dtype,
    reduce: Reduce | None = None,
    *,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor]:
    """FP8 codes [N, K] and scales [N, 1] of a matrix, one scale for each row.

    `reduce`: where the rows are parts of longer ones, as in quantize_int. `power_of_two`: scales
    are rounded up to powers of two.
    """
    values = weight.float()
    low, high = torch.aminmax(values, dim=-1, keepdim=True)
    if reduce is not None:
        low, high = reduce(low, high)
    scale = _fp8_scale(torch.maximum(-low, high), scale_dtype, power_of_two)
    return _to_fp8(values / scale.float()), scale


def quantize_fp8_block(
    weight: Tensor, block: int, scale_dtype: torch.dtype, *, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """FP8 codes [N, K] and scales [ceil(N/block), ceil(K/block)] of a matrix's square blocks.

    Blocks at the end may be smaller. `power_of_two`: scales are rounded up to powers of two.
    """
    n, k = weight.shape
    rows, columns = -(-n // block), -(-k // block)
    values = weight.float()
    padded = torch.nn.functional.pad(values, (0, columns * block - k, 0, rows * block - n))
    largest = padded.view(rows, block, columns, block).abs().amax((1, 3))
    scale = _fp8_scale(largest, scale_dtype, power_of_two)
    spread = scale.float().repeat_interleave(block, 0)[:n].repeat_interleave(block, 1)[:, :k]
    return _to_fp8(values / spread), scale


def dequantize_fp8_block(codes: Tensor, scale: Tensor, block: int) -> Tensor:
    """float32 [N, K] of FP8 codes [N, K] and one scale for each square block."""
    n, k = codes.shape
    spread = scale.float().repeat_interleave(block, 0)[:n].repeat_interleave(block, 1)[:, :k]
    return codes.float() * spread


class NotFiniteError(ValueError):
    """A weight is infinite or not a number: `value` at `row`, `column` of its matrix."""

    def __init__(self, row: int, column: int, value: float) -> None:
        super().__init__(row, column, value)
        self.row, self.column, self.value = row, column, value

    def text(self, layer: str, first_row: int = 0, of_what: str = "") -> str:
        """What a user is told: the matrix of `layer`, whose rows begin with `first_row` here."""
        return (
            f"{layer} is {self.value} at output row {first_row + self.row}, input {self.column}"
            f"{of_what}; the checkpoint is damaged, a scale made of it would be too"
        )


def check_finite(weight: Tensor) -> None:
    """Raises NotFiniteError naming the first weight that is infinite or not a number."""
    # One pass and no mask: a sum with such a weight in it is one itself. Large weights may make it
    # one too; the second look tells.
    if torch.isfinite(weight.sum()):
        return
    bad = (~torch.isfinite(weight)).nonzero()
    if len(bad):
        row, column = (int(index) for index in bad[0])
        raise NotFiniteError(row, column, float(weight[row, column]))


def _from_range(
    low: Tensor, high: Tensor, rounding: Rounding, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points from each group's extremes."""
    if rounding.method == "signed":
        extreme = torch.where(-low >= high, low, high)
        return (extreme / rounding.low).to(dtype), None
    if rounding.symmetric:
        largest = torch.maximum(-low, high)
        return (largest / ((rounding.high - rounding.low) / 2)).to(dtype), None
    low, high = low.clamp(max=0), high.clamp(min=0)
    return _asymmetric(low, high, rounding, dtype)


def _asymmetric(
    low: Tensor, high: Tensor, rounding: Rounding, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    scale = ((high - low) / (rounding.high - rounding.low)).to(dtype)
    step = torch.where(scale == 0, torch.ones_like(scale), scale).float()
    zero = (rounding.low - low / step).round_().clamp_(rounding.low, rounding.high)
    return scale, zero


def _codes(groups: Tensor, scale: Tensor, zero: Tensor | None, rounding: Rounding) -> Tensor:
    codes = (groups / scale.unsqueeze(-1)).round_()
    if zero is not None:
        codes += zero.unsqueeze(-1)
    return codes.clamp_(rounding.low, rounding.high)


def _searched(
    groups: Tensor, low: Tensor, high: Tensor, rounding: Rounding, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points with the least (weighted) squared error among shrunk ranges; the
    symmetric ones of both signs, since the codes reach one step further below zero than above."""
    weighted = rounding.mse_weight == "square"
    importance = groups.square() if weighted else None
    best = torch.full_like(low, torch.inf)
    best_scale = torch.ones_like(low, dtype=dtype)
    best_zero = None if rounding.symmetric else torch.zeros_like(low)
    for scale, zero in _candidates(low, high, rounding, dtype):
        step = torch.where(scale == 0, torch.ones_like(scale), scale)
        codes = _codes(groups, step.float(), zero, rounding)
        if zero is not None:
            codes -= zero.unsqueeze(-1)
        error = codes.mul_(step.float().unsqueeze(-1)).sub_(groups).square_()
        if importance is not None:
            error *= importance
        total = error.sum(-1)
        better = total < best
        best = torch.where(better, total, best)
        best_scale = torch.where(better, step, best_scale)
        if best_zero is not None and zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _candidates(
    low: Tensor, high: Tensor, rounding: Rounding, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor | None]]:
    if not rounding.symmetric:
        low, high = low.clamp(max=0), high.clamp(min=0)
        for part in _SHRINK:
            yield _asymmetric(low * part, high * part, rounding, dtype)
        return
    largest = torch.maximum(-low, high)
    half = (rounding.high - rounding.low) / 2
    # The whole range without clipping above zero, and that of "signed", are among them.
    for part in (half / rounding.high, half / -rounding.low, *_SHRINK):
        for sign in (1, -1):
            yield (largest * part / (sign * half)).to(dtype), None


def _fp8_scale(largest: Tensor, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    scale = largest / FP8_MAX
    if power_of_two:
        # Of the exact quotient: `dtype` may round it down to a power of two, which would clip.
        scale = torch.where(scale == 0, scale, _power_of_two_above(scale))
    scale = scale.to(dtype)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _power_of_two_above(scale: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2**exponent, mantissa in [0.5, 1)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.ldexp(torch.ones_like(scale), exponent)


def _to_fp8(values: Tensor) -> Tensor:
    return values.clamp_(-FP8_MAX, FP8_MAX).to(FP8)
