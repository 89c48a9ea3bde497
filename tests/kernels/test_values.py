# SPDX-License-Identifier: Apache-2.0
"""Values at the edges of what a dtype holds: subnormal, huge, infinite, NaN, zero."""

import dataclasses

import pytest
import torch
from linear_cases import (
    DTYPES,
    FP8,
    INTEGER,
    KEPT,
    MODES,
    WITHOUT_ZERO_POINTS,
    Layer,
    assert_right,
    expected,
    make_layer,
    make_x,
    pack_bits,
)

pytestmark = pytest.mark.usefixtures("extension")

DYNAMIC = (
    *(mode for mode in INTEGER if "static" not in mode),
    *(mode for mode in FP8 if mode in ("fp8_token", "fp8_group")),
)


@pytest.mark.parametrize("zero", [0, 1], ids=["sym", "asym"])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", KEPT)
def test_activations_are_not_rounded_to_bf16(
    isa: str, mode: str, dtype: torch.dtype, rows: int, zero: int
) -> None:
    """Weights c, -c, c, -c ... take differences of neighbours in x, which are 2**-10 of x: nothing
    is left of them in bf16. Everything is exact in float32, so the result must be."""
    n, k, bits = 33, 64, int(mode[1])
    generator = torch.Generator().manual_seed(2)
    weight = torch.randint(1, 7, (n, k // 2), generator=generator).repeat_interleave(2, dim=1)
    weight[:, 1::2] *= -1
    codes = pack_bits(weight + zero, bits)
    zeros = pack_bits(torch.full((2, n), zero), bits).t().contiguous() if zero else None
    layer = Layer(mode, n, k, 32, codes, torch.ones(n, 2, dtype=dtype), zeros, None, bits)
    x = 2.0 ** torch.randint(-3, 3, (rows, k // 2), generator=generator)
    x = torch.stack((x * (1 + 2.0**-10), x), dim=2).view(rows, k).to(dtype)
    want = expected(layer, x).y
    assert (want > 0).all()
    assert not expected(layer, x.bfloat16()).y.any()
    assert torch.equal(layer(x), want.to(dtype))


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float16, 2.0**-24),  # the smallest subnormal
        (torch.float16, 2.0**-15 * 1.5),
        (torch.float16, 65504.0),  # the largest number
        (torch.bfloat16, 2.0**-100),
        (torch.bfloat16, 2.0**100),
        (torch.float32, 2.0**-100),
        (torch.float32, 2.0**100),
        (torch.float32, 1 + 2.0**-23),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_extreme_values(isa: str, mode: str, dtype: torch.dtype, value: float, rows: int) -> None:
    """Far from 1 the arithmetic is the same; scales bring the result back into range."""
    layer = make_layer(mode, 40, 96, 32, dtype, scale_dtype=torch.float32)
    layer = layer.times(min(1.0, 1 / value), dtype)
    if layer.x_scale is not None:
        layer = dataclasses.replace(layer, x_scale=torch.tensor([value / 100]))
    x = torch.full((rows, 96), value).to(dtype) * make_x(rows, 96, torch.float32).sign().to(dtype)
    assert float(x.abs().max()) == value
    assert_right(layer(x), expected(layer, x))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_infinite_and_nan_activations_stay_in_their_row(
    isa: str, mode: str, dtype: torch.dtype, bad: float
) -> None:
    """The row that holds one has no finite output; every other row is untouched, bit for bit. With
    a given scale an infinity is the outermost code, and only NaN has no meaning."""
    for asymmetric in (False,) if mode in WITHOUT_ZERO_POINTS else (False, True):
        layer = make_layer(mode, 35, 64, 32, dtype, asymmetric)
        for rows, where in ((2, 1), (9, 4), (40, 17)):
            x = make_x(rows, 64, dtype)
            clean = layer(x)
            x[where, 37] = bad
            y = layer(x)
            others = torch.arange(rows) != where
            assert torch.equal(y[others], clean[others])
            if layer.x_scale is not None and bad == bad:
                assert_right(y, expected(layer, x))
                continue
            assert not y[where][layer.real_weight()[:, 37] != 0].isfinite().any()
            if mode in DYNAMIC:
                assert not y[where].isfinite().any()


@pytest.mark.parametrize("k", [5, 37, 64, 100])
@pytest.mark.parametrize("mode", DYNAMIC)
def test_a_value_that_is_not_finite_is_seen_wherever_it_is(isa: str, mode: str, k: int) -> None:
    """Every position of a row counts, the last ones of no whole vector too."""
    layer = make_layer(mode, 16, k, -1, torch.float32)
    for bad in (float("inf"), float("-inf"), float("nan")):
        x = torch.zeros(k, k).fill_diagonal_(bad)
        assert not layer(x).isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_overflow_of_the_output_is_infinite(isa: str, mode: str, dtype: torch.dtype) -> None:
    """A result beyond the dtype's range becomes an infinity of its sign, as torch rounds."""
    layer = make_layer(mode, 20, 32, 32, dtype)
    layer = layer.with_scale(torch.finfo(dtype).max / 8)
    if layer.x_scale is not None:
        layer = dataclasses.replace(layer, x_scale=torch.tensor([0.125]))
    x = torch.full((3, 32), 16.0, dtype=dtype)
    want = expected(layer, x).y
    y = layer(x)
    beyond = want.abs() > 2 * torch.finfo(dtype).max
    assert beyond.any()
    assert torch.equal(y[beyond].double(), want[beyond].sign() * float("inf"))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_rows_of_zeros(isa: str, mode: str, dtype: torch.dtype, bias: bool) -> None:
    """A row of zeros gives exactly the bias, among rows that are not zero, too."""
    for rows in (1, 9, 40):
        layer = make_layer(mode, 35, 64, 32, dtype, asymmetric=True, bias=bias)
        x = make_x(rows, 64, dtype)
        x[::2] = 0
        y = layer(x)
        assert_right(y, expected(layer, x))
        want = torch.zeros(35, dtype=dtype) if layer.bias is None else layer.bias
        assert all(torch.equal(row, want) for row in y[::2])


@pytest.mark.parametrize("mode", MODES)
def test_every_element_of_the_output_is_written(isa: str, mode: str) -> None:
    """Memory that torch hands out again still holds NaN: the op must leave none of it."""
    layer = make_layer(mode, 35, 64, 32, torch.float32)
    for rows in (1, 3, 8, 40, 300):
        x = make_x(rows, 64, torch.float32)
        want = layer(x)
        for _ in range(3):
            torch.full((rows, 35), float("nan"))  # freed at once
            assert torch.equal(layer(x), want)
