# SPDX-License-Identifier: Apache-2.0
"""w4a16_linear against the float64 oracle: shapes, layouts of x, dtypes, values at the edges."""

import functools

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor
from w4a16_cases import (
    DTYPES,
    Expected,
    Layer,
    assert_right,
    expected,
    make_layer,
    make_x,
    pairwise,
)

from vllm_plugin_tm.kernels import reference

pytestmark = pytest.mark.usefixtures("extension")

# (group size, K): one group and several, groups of one dword, of no power of two, longer than a
# panel of decoded weights (128), channels with K of no whole dword, and the usual ones.
GROUPS = (
    (8, 8),
    (8, 24),
    (24, 72),
    (32, 32),
    (32, 96),
    (64, 64),
    (64, 192),
    (128, 128),
    (128, 640),
    (136, 272),
    (384, 768),
    (-1, 4),
    (-1, 20),
    (-1, 100),
    (-1, 320),
)
ROWS = (0, 1, 2, 3, 5, 6, 7, 8, 17, 64, 129, 300, 521)
CHANNELS = (1, 15, 16, 17, 48, 65, 100, 129)


def _nan(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def _contiguous(x: Tensor) -> Tensor:
    return x


def _row_stride(x: Tensor) -> Tensor:
    """Rows with NaN before and after them: what lies between rows is not read as data."""
    wide = _nan(x.shape[0] + 2, x.shape[1] + 13, dtype=x.dtype)
    wide[1:-1, 5:-8] = x
    return wide[1:-1, 5:-8]


def _unaligned(x: Tensor) -> Tensor:
    """Contiguous, but one element after an aligned address."""
    flat = _nan(x.numel() + 2, dtype=x.dtype)
    flat[1:-1] = x.flatten()
    return flat[1:-1].view(x.shape)


def _transposed(x: Tensor) -> Tensor:
    """Inner stride of M instead of 1."""
    return x.t().contiguous().t()


def _every_second(x: Tensor) -> Tensor:
    """Inner stride of 2 with NaN between the elements."""
    wide = _nan(x.shape[0], 2 * x.shape[1], dtype=x.dtype)
    wide[:, ::2] = x
    return wide[:, ::2]


def _three_dims(x: Tensor) -> Tensor:
    return x.view(1, *x.shape)


def _three_dims_strided(x: Tensor) -> Tensor:
    """[batch, 1, K] cut out of [batch, 2, K], the other half NaN."""
    wide = _nan(x.shape[0], 2, x.shape[1], dtype=x.dtype)
    wide[:, :1] = x.unsqueeze(1)
    return wide[:, :1]


VIEWS = (
    _contiguous,
    _row_stride,
    _unaligned,
    _transposed,
    _every_second,
    _three_dims,
    _three_dims_strided,
)
GRID = pairwise(
    rows=ROWS,
    n=CHANNELS,
    group=GROUPS,
    view=VIEWS,
    dtype=DTYPES,
    asymmetric=(False, True),
    bias=(False, True),
)


def _name(case: dict) -> str:
    group, k = case["group"]
    return (
        f"M{case['rows']}-N{case['n']}-K{k}-g{group}-{str(case['dtype'])[6:]}"
        f"-{'asym' if case['asymmetric'] else 'sym'}{'-bias' if case['bias'] else ''}"
        f"-{case['view'].__name__[1:]}"
    )


@functools.cache
def _grid_case(index: int) -> tuple[Layer, Tensor, Expected, Expected]:
    """Layer, x, what is right, what a scale error of 1 % gives: once for all instruction sets."""
    case = GRID[index]
    group, k = case["group"]
    layer = make_layer(case["n"], k, group, case["dtype"], case["asymmetric"], case["bias"])
    x = case["view"](make_x(case["rows"], k, case["dtype"]))
    return layer, x, expected(layer, x), expected(layer, x, scale_factor=1.01)


@pytest.mark.parametrize("index", range(len(GRID)), ids=lambda index: _name(GRID[index]))
def test_against_the_oracle(isa: str, index: int) -> None:
    """Every pair of values of every two axes; and a scale error of 1 % would be seen."""
    layer, x, right, wrong = _grid_case(index)
    before = x.clone()
    y = layer(x)
    assert y.dtype == x.dtype
    assert_right(y, right)
    assert torch.equal(x, before)
    if y.numel():
        with pytest.raises(AssertionError):
            assert_right(y, wrong)


@functools.cache
def _real_case(
    group: int, dtype: torch.dtype, asymmetric: bool
) -> tuple[Layer, Tensor, list[Expected]]:
    layer = make_layer(272, 2048, group, dtype, asymmetric, bias=True)
    x = make_x(33, 2048, dtype)
    return layer, x, [expected(layer, x, factor) for factor in (1.0, 0.99, 1.01)]


@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [32, 128, -1])
def test_real_sizes(isa: str, group: int, dtype: torch.dtype, asymmetric: bool) -> None:
    """A layer of a real model's width; a 1 % scale error, up or down, is seen here as well."""
    layer, x, (right, *wrong) = _real_case(group, dtype, asymmetric)
    for rows in (1, 4, 33):
        y = layer(x[:rows])
        assert_right(y, Expected(right.y[:rows], right.allowed[:rows]))
        for other in wrong:
            with pytest.raises(AssertionError):
                assert_right(y, Expected(other.y[:rows], other.allowed[:rows]))


@pytest.mark.parametrize("zero", [0, 1], ids=["sym", "asym"])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_activations_are_not_rounded_to_bf16(
    isa: str, dtype: torch.dtype, rows: int, zero: int
) -> None:
    """Weights c, -c, c, -c ... take differences of neighbours in x, which are 2**-10 of x: nothing
    is left of them in bf16. Everything is exact in float32, so the result must be."""
    n, k = 33, 64
    generator = torch.Generator().manual_seed(2)
    weight = torch.randint(1, 7, (n, k // 2), generator=generator).repeat_interleave(2, dim=1)
    weight[:, 1::2] *= -1
    codes = pack_to_int32((weight + zero).to(torch.int8), 4)
    zeros = pack_to_int32(torch.full((n, 2), zero, dtype=torch.int8), 4, packed_dim=0).contiguous()
    layer = Layer(n, k, 32, codes, torch.ones(n, 2, dtype=dtype), zeros if zero else None, None)
    x = 2.0 ** torch.randint(-3, 3, (rows, k // 2), generator=generator)
    x = torch.stack((x * (1 + 2.0**-10), x), dim=2).view(rows, k).to(dtype)
    want = reference.w4a16_linear(x, *layer.disk)
    assert (want > 0).all()
    assert not reference.w4a16_linear(x.bfloat16(), *layer.disk).any()
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
def test_extreme_values(isa: str, dtype: torch.dtype, value: float, rows: int) -> None:
    """Far from 1 the arithmetic is the same; scales bring the result back into range."""
    layer = make_layer(40, 96, 32, torch.float32)
    scale = (layer.scale * min(1.0, 1 / value)).to(dtype)
    layer = type(layer)(40, 96, 32, layer.codes, scale, None, None)
    x = torch.full((rows, 96), value).to(dtype) * make_x(rows, 96, torch.float32).sign().to(dtype)
    assert float(x.abs().max()) == value
    assert_right(layer(x), expected(layer, x))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_and_nan_activations_stay_in_their_row(
    isa: str, dtype: torch.dtype, asymmetric: bool, bad: float
) -> None:
    """The row that holds one has no finite output; every other row is untouched, bit for bit."""
    layer = make_layer(35, 64, 32, dtype, asymmetric)
    for rows, where in ((2, 1), (9, 4), (40, 17)):
        x = make_x(rows, 64, dtype)
        clean = layer(x)
        x[where, 37] = bad
        y = layer(x)
        others = torch.arange(rows) != where
        assert torch.equal(y[others], clean[others])
        weight = reference.dequantize_w4(*layer.disk, 64)[:, 37]
        assert not y[where][weight != 0].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_overflow_of_the_output_is_infinite(isa: str, dtype: torch.dtype) -> None:
    """A result beyond the dtype's range becomes an infinity of its sign, as torch rounds."""
    layer = make_layer(20, 32, 32, dtype)
    scale = torch.full_like(layer.scale, torch.finfo(dtype).max / 8)
    layer = type(layer)(20, 32, 32, layer.codes, scale, None, None)
    x = torch.full((3, 32), 16.0, dtype=dtype)
    want = reference.w4a16_linear(x, *layer.disk)
    y = layer(x)
    beyond = want.abs() > 2 * torch.finfo(dtype).max
    assert beyond.any()
    assert torch.equal(y[beyond].double(), want[beyond].sign() * float("inf"))


def test_rows_may_be_one_and_the_same(isa: str) -> None:
    """An expanded x has row stride 0."""
    layer = make_layer(48, 64, 32, torch.bfloat16)
    x = make_x(1, 64, torch.bfloat16).expand(9, 64)
    assert torch.equal(layer(x), layer(x.clone()))


def test_one_dimension(isa: str) -> None:
    """x [K] gives y [N]."""
    layer = make_layer(48, 64, 32, torch.bfloat16)
    x = make_x(1, 64, torch.bfloat16)
    assert torch.equal(layer(x[0]), layer(x)[0])


@pytest.mark.parametrize("shape", [(0, 64), (0, 5, 64), (5, 0, 64)])
def test_no_rows(isa: str, shape: tuple[int, ...]) -> None:
    """An empty batch gives an empty result of the right shape."""
    layer = make_layer(48, 64, 32, torch.bfloat16)
    y = layer(torch.empty(shape, dtype=torch.bfloat16))
    assert y.shape == (*shape[:-1], 48)
    assert y.dtype == torch.bfloat16
