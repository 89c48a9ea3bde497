# SPDX-License-Identifier: Apache-2.0
"""Integer activations: codes as the compressed-tensors library has them, exact sums without
overflow, one result for all instruction sets."""

import dataclasses
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from linear_cases import (
    DTYPES,
    INTEGER,
    W4A8,
    W8A8,
    Layer,
    assert_right,
    expected,
    make_layer,
    make_x,
    pack_bits,
    pairwise,
)
from torch import Tensor

from vllm_plugin_tm.kernels import ops

pytestmark = pytest.mark.usefixtures("extension")


def _identity(mode: str, k: int) -> Layer:
    """Weights that pick out single activations: y is what x was rounded to."""
    codes = torch.eye(k, dtype=torch.int8)
    w8a8 = mode in W8A8
    return Layer(mode, k, k, -1, codes if w8a8 else pack_bits(codes, 4), torch.ones(k, 1))


def _ties() -> Tensor:
    """Rows [., 64] in which every quotient by the scale lies half way between two codes, for scales
    that are powers of two: ranges of 127.5 to either side, and asymmetric ranges of 255 whose zero
    points are halves as well. All of it is exact in fp16, numbers up to 127.5 in bf16."""
    halves = torch.arange(0.5, 127.5, 2.0)[:62]
    rows = [torch.cat((torch.tensor([127.5, -127.5]), sign * halves)) for sign in (1, -1)]
    for low in (-126.5, -127.5, -0.5, -1.5, -64.5, -254.5):
        within = torch.arange(1, 63) * 3.0 + low
        rows.append(torch.cat((torch.tensor([low, low + 255]), within)))
    table = torch.stack(rows)
    return torch.cat([table * 2.0**power for power in (-9, 0, 7)])


def _library(x: Tensor, args: QuantizationArgs, static: tuple[Tensor, Tensor] | None) -> Tensor:
    """x as the library rounds it, in float32."""
    x = x.float()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale, zero = static or calculate_qparams(low, high, args)
    return dequantize(quantize(x, scale, zero, args), scale, zero, args)


def _arguments(mode: str) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=8,
        symmetric=not mode.endswith("asym"),
        strategy="tensor" if "static" in mode else "token",
        dynamic="static" not in mode,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["w4a8", "w8a8", "w8a8_asym"])
def test_codes_are_the_librarys(isa: str, mode: str, dtype: torch.dtype) -> None:
    """Every activation is rounded to what the library rounds it to, ties and outliers included."""
    layer = _identity(mode, 64)
    wide = make_x(400, 64, torch.float32) * torch.logspace(-3, 0.7, 400).unsqueeze(1)
    for x in (_ties(), wide, wide.abs(), -wide.abs(), wide**3):
        x = x.to(dtype)
        assert torch.equal(layer(x), _library(x, _arguments(mode), None).to(dtype))


@pytest.mark.parametrize("zero", [-128, -37, 0, 1, 127])
@pytest.mark.parametrize("scale", [2.0**-10, 0.25, 1.0, 0.013, 64.0])
def test_static_codes_are_the_librarys(isa: str, scale: float, zero: int) -> None:
    """The same with a given scale and zero point: far too small, far too large, and the extreme
    zero points, where one side of x is clamped away."""
    static = torch.tensor([scale]), torch.tensor([zero], dtype=torch.int32)
    mode = "w8a8_static_asym"
    layer = dataclasses.replace(_identity(mode, 64), x_scale=static[0], x_zero_point=static[1])
    for dtype in DTYPES:
        for x in (_ties(), make_x(300, 64, torch.float32)):
            x = x.to(dtype)
            assert torch.equal(layer(x), _library(x, _arguments(mode), static).to(dtype))
    if zero == 0:
        symmetric = dataclasses.replace(layer, mode="w8a8_static", x_zero_point=None)
        assert torch.equal(symmetric(x), layer(x))


@pytest.mark.parametrize("group", [8, 24, 32])
def test_codes_of_groups_are_the_librarys(isa: str, group: int) -> None:
    """With x_groups each group of a row has its own scale."""
    k = 96
    codes = pack_bits(torch.eye(k, dtype=torch.int8), 4)
    layer = Layer("w4a8_groups", k, k, group, codes, torch.ones(k, k // group))
    args = QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
    for dtype in DTYPES:
        x = (make_x(40, k, torch.float32) * torch.logspace(-3, 3, k)).to(dtype)
        want = _library(x.view(-1, group), args, None).view(-1, k)
        assert torch.equal(layer(x), want.to(dtype))


def _exact_x(mode: str, rows: int, k: int, group: int) -> Tensor:
    """Activations whose scale is 1: whole numbers, and one value for each end of the range."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-127, 128, (rows, k), generator=generator).float()
    low, high = (-128.0, 127.0) if mode == "w8a8_asym" else (-127.5, 127.5)
    x[:, 0::group], x[:, 1::group] = low, high
    return x


@pytest.mark.parametrize(
    ("mode", "asymmetric"),
    [(mode, False) for mode in INTEGER] + [(mode, True) for mode in W4A8],
)
def test_sums_of_integers_are_exact(isa: str, mode: str, asymmetric: bool) -> None:
    """With scales of 1 and sums below 2**24 nothing is rounded: equal, not near."""
    n, group, k = 35, 40, 400
    layer = make_layer(mode, n, k, group, torch.float32, asymmetric)
    layer = dataclasses.replace(layer, scale=torch.ones_like(layer.scale))
    if layer.x_scale is not None:
        layer = dataclasses.replace(layer, x_scale=torch.ones(1))
    for rows in (1, 3, 8, 40):
        x = _exact_x(mode, rows, k, group)
        want = expected(layer, x).y
        assert float(want.abs().max()) < 2**24
        assert torch.equal(layer(x).double(), want)


def _extreme_x(rows: int, k: int) -> Tensor:
    """Rows that are all at one end, at the other, and alternating by element and by pair."""
    x = torch.ones(rows, k)
    x[1::4] = -1
    x[2::4, ::2] = -1
    x[3::4] = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(k // 4)
    return x


@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("mode", ["w4a8", *W8A8])
def test_no_overflow(isa: str, mode: str, rows: int) -> None:
    """K = 65536 with all codes at their ends: sums of up to 65536 * 255 * 128 < 2**31, and none of
    the smaller integers on the way may saturate."""
    n, k = 20, 65536
    generator = torch.Generator().manual_seed(3)
    most = 8 if mode in W4A8 else 128
    codes = torch.full((n, k), -most, dtype=torch.int8)
    codes[1::4] = most - 1
    codes[2::4, 1::2] = most - 1
    codes[3::4] = torch.where(torch.rand(k, generator=generator) < 0.5, -most, most - 1)
    scale = torch.full((n, 1), 1e-6)
    x = _extreme_x(rows, k)
    layers = []
    if mode == "w4a8":
        for zero in (None, -8, 7):
            zeros = (
                None if zero is None else pack_bits(torch.full((1, n), zero), 4).t().contiguous()
            )
            layers.append(Layer(mode, n, k, -1, pack_bits(codes, 4), scale, zeros))
    elif mode == "w8a8_static_asym":
        for zero in (-128, 127):
            point = torch.tensor([zero], dtype=torch.int32)
            layers.append(
                Layer(mode, n, k, -1, codes, scale, None, None, 8, torch.tensor([1e-4]), point)
            )
    else:
        static = torch.tensor([1e-4]) if mode == "w8a8_static" else None
        layers.append(Layer(mode, n, k, -1, codes, scale, bits=8, x_scale=static))
    for layer in layers:
        assert_right(layer(x), expected(layer, x))


def _same_bits_grid() -> list[dict[str, Any]]:
    return pairwise(
        mode=INTEGER,
        rows=(1, 2, 5, 8, 33, 129),
        n=(1, 17, 48, 129),
        group=((8, 24), (32, 96), (136, 272), (-1, 20), (-1, 320), (-1, 1003)),
        dtype=DTYPES,
        asymmetric=(False, True),
        bias=(False, True),
    )


@pytest.mark.parametrize(
    "case", _same_bits_grid(), ids=lambda case: "-".join(map(str, case.values()))
)
def test_the_same_bits_on_every_instruction_set(extension: None, case: dict[str, Any]) -> None:
    """Integers are exact and the few roundings that follow come in one order everywhere."""
    isas = ops.cpu_isas()
    if len(isas) < 2:
        pytest.skip("this processor has one instruction set with kernels")
    group, k = case["group"]
    layer = make_layer(
        case["mode"], case["n"], k, group, case["dtype"], case["asymmetric"], case["bias"]
    )
    x = make_x(case["rows"], k, case["dtype"])
    before = ops.get_isa()
    results = []
    try:
        for isa in isas:
            ops.set_isa(isa)
            results.append(layer(x))
    finally:
        ops.set_isa(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
