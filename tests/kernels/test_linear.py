# SPDX-License-Identifier: Apache-2.0
"""Every linear op against the float64 oracle: shapes, layouts of x, dtypes, weights, modes."""

import functools
from typing import Any

import pytest
import torch
from linear_cases import (
    DTYPES,
    FP4,
    FP8,
    KEPT,
    MODES,
    ON_OWN_KERNELS,
    W4A8,
    W8A8,
    WITHOUT_ZERO_POINTS,
    Expected,
    Layer,
    assert_right,
    expected,
    make_layer,
    make_x,
    pairwise,
)
from torch import Tensor
from x_views import VIEWS

pytestmark = pytest.mark.usefixtures("extension")

# (group size, K): one group and several, groups of one dword, of an odd number of dwords, channels
# with K of no whole dword, and the usual ones.
GROUPS = {
    4: (
        (8, 8),
        (8, 24),
        (24, 72),
        (32, 96),
        (64, 64),
        (128, 640),
        (136, 272),
        (384, 768),
        (-1, 4),
        (-1, 20),
        (-1, 100),
        (-1, 320),
    ),
    8: (
        (4, 4),
        (4, 12),
        (12, 36),
        (20, 100),
        (32, 96),
        (64, 64),
        (128, 640),
        (136, 272),
        (-1, 1),
        (-1, 3),
        (-1, 102),
        (-1, 320),
    ),
    "float4": (
        (8, 8),
        (16, 48),
        (24, 72),
        (32, 96),
        (64, 64),
        (128, 640),
        (136, 272),
        (-1, 8),
        (-1, 40),
        (-1, 320),
    ),
}
CHANNEL_KS = (1, 2, 3, 4, 7, 20, 33, 64, 102, 320, 1001)
ROWS = (0, 1, 2, 3, 5, 8, 17, 33, 64, 129, 521)
CHANNELS = (1, 15, 16, 17, 48, 65, 100, 129)


def _bits(mode: str) -> int | str:
    if mode in FP4:
        return "float4"  # whole bytes
    return 8 if "w8" in mode or mode in FP8 else 4


def _grid(mode: str) -> list[dict[str, Any]]:
    axes: dict[str, Any] = {
        "group": [(-1, k) for k in CHANNEL_KS] if mode in W8A8 else GROUPS[_bits(mode)],
        "rows": ROWS,
        "n": CHANNELS,
        "view": VIEWS,
        "dtype": DTYPES,
        "bias": (False, True),
    }
    if mode not in WITHOUT_ZERO_POINTS:
        axes["asymmetric"] = (False, True)
    if mode in W4A8:  # the only op whose scales need not have the activations' dtype
        axes["scale_dtype"] = DTYPES
    return pairwise(**axes)


GRIDS = {mode: _grid(mode) for mode in MODES}


def _name(mode: str, case: dict[str, Any]) -> str:
    group, k = case["group"]
    return (
        f"{mode}-M{case['rows']}-N{case['n']}-K{k}-g{group}-{str(case['dtype'])[6:]}"
        f"{'-asym' if case.get('asymmetric') else ''}{'-bias' if case['bias'] else ''}"
        f"-{case['view'].__name__[1:]}"
    )


@functools.cache
def _grid_case(mode: str, index: int) -> tuple[Layer, Tensor, Expected, Expected]:
    """Layer, x, what is right, what a scale error of 1 % gives: once for all instruction sets."""
    case = dict(GRIDS[mode][index])
    group, k = case.pop("group")
    view, rows, n, dtype = (case.pop(name) for name in ("view", "rows", "n", "dtype"))
    layer = make_layer(mode, n, k, group, dtype, **case)
    x = view(make_x(rows, k, dtype))
    return layer, x, expected(layer, x), expected(layer, x, scale_factor=1.01)


@pytest.mark.parametrize(
    ("isa", "mode", "index"),
    [
        pytest.param(isa, mode, index, id=f"{isa}-{_name(mode, case)}")
        for mode, isa in ON_OWN_KERNELS
        for index, case in enumerate(GRIDS[mode])
    ],
    indirect=["isa"],
)
def test_against_the_oracle(isa: str, mode: str, index: int) -> None:
    """Every pair of values of every two axes; and a scale error of 1 % would be seen."""
    layer, x, right, wrong = _grid_case(mode, index)
    before = x.clone()
    y = layer(x)
    assert y.dtype == x.dtype
    assert_right(y, right)
    assert torch.equal(x, before)
    # One element alone may be all bias.
    if y.numel() >= 16:
        with pytest.raises(AssertionError):
            assert_right(y, wrong)


@functools.cache
def _real_case(
    mode: str, group: int, dtype: torch.dtype, asymmetric: bool
) -> tuple[Layer, Tensor, list[Expected]]:
    layer = make_layer(mode, 272, 2048, group, dtype, asymmetric, bias=True)
    x = make_x(33, 2048, dtype)
    return layer, x, [expected(layer, x, factor) for factor in (1.0, 0.99, 1.01)]


REAL = [
    pytest.param(mode, group, asymmetric, id=f"{mode}-g{group}-{'asym' if asymmetric else 'sym'}")
    for mode in MODES
    for group in ((-1,) if mode in W8A8 else (32, 128, -1))
    for asymmetric in ((False,) if mode in WITHOUT_ZERO_POINTS else (False, True))
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mode", "group", "asymmetric"), REAL)
def test_real_sizes(isa: str, mode: str, group: int, dtype: torch.dtype, asymmetric: bool) -> None:
    """A layer of a real model's width; a 1 % scale error, up or down, is seen here as well."""
    layer, x, (right, *wrong) = _real_case(mode, group, dtype, asymmetric)
    for rows in (1, 4, 33):
        y = layer(x[:rows])
        assert_right(y, Expected(right.y[:rows], right.allowed[:rows]))
        for other in wrong:
            with pytest.raises(AssertionError):
                assert_right(y, Expected(other.y[:rows], other.allowed[:rows]))


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize(("group", "k"), [(24, 72), (32, 96), (-1, 101)])
def test_odd_widths(isa: str, bits: int, asymmetric: bool, group: int, k: int) -> None:
    """Codes of other widths than the kernel's, packed across words, give what the oracle says."""
    for mode in ("w4a16", "w4a8") if bits < 4 else ("w8a16",):
        for dtype in DTYPES:
            layer = make_layer(mode, 40, k, group, dtype, asymmetric, bias=True, bits=bits)
            x = make_x(9, k, dtype)
            assert_right(layer(x), expected(layer, x))


@pytest.mark.parametrize("mode", MODES)
def test_rows_may_be_one_and_the_same(isa: str, mode: str) -> None:
    """An expanded x has row stride 0."""
    layer = make_layer(mode, 48, 64, 32, torch.bfloat16)
    x = make_x(1, 64, torch.bfloat16).expand(9, 64)
    assert torch.equal(layer(x), layer(x.clone()))


@pytest.mark.parametrize("mode", MODES)
def test_one_dimension(isa: str, mode: str) -> None:
    """x [K] gives y [N]."""
    layer = make_layer(mode, 48, 64, 32, torch.bfloat16)
    x = make_x(1, 64, torch.bfloat16)
    assert torch.equal(layer(x[0]), layer(x)[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0, 64), (0, 5, 64), (5, 0, 64)])
def test_no_rows(isa: str, mode: str, shape: tuple[int, ...]) -> None:
    """An empty batch gives an empty result of the right shape."""
    layer = make_layer(mode, 48, 64, 32, torch.bfloat16)
    y = layer(torch.empty(shape, dtype=torch.bfloat16))
    assert y.shape == (*shape[:-1], 48)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("mode", [*KEPT, *W4A8, *FP8])
def test_minus_one_and_k_are_one_group(isa: str, mode: str) -> None:
    """Group size -1 and group size K are the same layer, so that any K will do."""
    layer = make_layer(mode, 20, 99, -1, torch.bfloat16, asymmetric=True)
    x = make_x(5, 99, torch.bfloat16)
    arguments = layer.arguments(x) | {"group_size": 99}
    assert torch.equal(layer(x), layer.linear(*arguments.values()))
