# SPDX-License-Identifier: Apache-2.0
"""Floats of 8 and 4 bits to the last code: every weight, every rounding of an activation."""

import dataclasses

import pytest
import torch
from linear_cases import DTYPES, FP4, FP8, make_layer, make_x

from vllm_plugin_tm.kernels import reference_float

pytestmark = pytest.mark.usefixtures("extension")

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
FINITE = E4M3[~E4M3.float().isnan()]


@pytest.mark.parametrize("rows", [1, 9, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_e4m3_weight(isa: str, dtype: torch.dtype, rows: int) -> None:
    """Against rows that pick one weight each: all 254 numbers, subnormal ones and -0 among them,
    at every place in a dword and a tile."""
    count = len(FINITE)
    weight = torch.stack([FINITE.view(torch.uint8).roll(i) for i in range(20)])
    layer = make_layer("fp8", 20, count, -1, dtype)
    layer = dataclasses.replace(
        layer, weight=weight.view(torch.float8_e4m3fn), scale=torch.ones(20, 1)
    )
    eye = torch.eye(count, dtype=dtype)
    y = torch.cat([layer(part) for part in eye.split(rows)])
    assert torch.equal(y.float(), weight.view(torch.float8_e4m3fn).float().t())


@pytest.mark.parametrize("rows", [1, 9, 40])
@pytest.mark.parametrize("mode", FP4)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_e2m1_weight_and_every_scale(
    isa: str, dtype: torch.dtype, mode: str, rows: int
) -> None:
    """All 16 numbers at every place in a dword, under every byte of scale that is a number in
    float32's range with them: as a double they are exact, and so is the float32 output."""
    codes = torch.tensor([[(i + j) % 16 for j in range(32)] for i in range(16)])
    weight = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
    # e8m0: 0 is 2**-127, 255 is not a number; times 6 the largest ones overflow.
    scales = range(253) if mode == "fp4_mx" else [*range(127), *range(128, 255)]
    if dtype == torch.float16:
        scales = [s for s in scales if mode == "fp4_nv" or 112 <= s <= 139]
    layer = make_layer(mode, 16, 32, 32, dtype)
    for scale in scales:
        byte = torch.full((16, 1), scale, dtype=torch.uint8)
        one = dataclasses.replace(layer, weight=weight, scale=byte, channel_scale=None)
        y = torch.cat([one(part) for part in torch.eye(32, dtype=dtype).split(rows)])
        want = one.real_weight().t()
        # Half of the smallest subnormal weights may be flushed by what asks the processor to.
        assert torch.equal(y.double(), want.to(dtype).double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", [mode for mode in FP8 if mode != "fp8"])
def test_activations_are_rounded_as_torch_rounds(isa: str, mode: str, dtype: torch.dtype) -> None:
    """Through weights that pick one value each the op shows its rounded activations, which are the
    oracle's bit for bit: of all bf16 sizes that matter, ties, subnormal results, zeros."""
    k, group = 256, 32
    eye = torch.eye(k).to(torch.float8_e4m3fn)
    ones = torch.ones(k, k // group)
    layer = make_layer(mode, k, k, group, dtype)
    layer = dataclasses.replace(layer, weight=eye, scale=ones, n=k)
    steps = torch.arange(0x3880, 0x4400, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = torch.cat([steps, -steps, torch.zeros(3, dtype=torch.bfloat16)])
    rows = values.repeat(-(-k * 23 // len(values)))[: k * 23].view(23, k).to(dtype)
    # Ties lie where x is a scale times half a step: rows whose largest value is 448 or 44.8.
    rows[:, 0] = 448
    rows[1::2] *= 0.1
    rows[3] = 0
    for x in (rows, make_x(9, k, dtype)):
        rounded = reference_float.round_x(x, layer._rounding, layer.x_scale, group)
        want = (rounded.values * rounded.scale).to(dtype)
        assert torch.equal(layer(x), want)
        for row in range(len(x)):
            assert torch.equal(layer(x[row]), want[row])


@pytest.mark.parametrize("rows", [1, 9])
def test_groups_of_activations_may_be_longer_than_those_of_weights(isa: str, rows: int) -> None:
    """64 neighbours of x share a scale where 16 weights do; the last group is shorter."""
    layer = make_layer("fp8_group", 33, 144, 16, torch.bfloat16)
    layer = dataclasses.replace(layer, x_group_size=64)
    x = make_x(rows, 144, torch.bfloat16) * torch.linspace(0.1, 40, 144).bfloat16()
    y, allowed = layer.oracle(x)
    assert ((layer(x).double() - y).abs() <= allowed).all()
    other, _ = dataclasses.replace(layer, x_group_size=16).oracle(x)
    assert ((layer(x).double() - other).abs() > allowed).any()


@pytest.mark.parametrize("size", [80, 100, 2**63 - 1])
def test_a_group_of_activations_may_be_a_whole_row(isa: str, size: int) -> None:
    """K and more is one group, whatever those of the weights; it is divided by its scale."""
    layer = make_layer("fp8_group", 33, 80, 16, torch.bfloat16)
    layer = dataclasses.replace(layer, x_group_size=size)
    x = make_x(9, 80, torch.bfloat16)
    y, allowed = dataclasses.replace(layer, x_group_size=80).oracle(x)
    assert ((layer(x).double() - y).abs() <= allowed).all()
    other, _ = dataclasses.replace(layer, x_group_size=16).oracle(x)
    assert ((layer(x).double() - other).abs() > allowed).any()


def test_subnormals_do_not_hang_on_the_callers_settings(isa: str) -> None:
    """A process that flushes subnormals to zero gets the same results from these weights."""
    layer = make_layer("fp8_token", 33, 64, 32, torch.bfloat16)
    tiny = torch.full((33, 64), 1, dtype=torch.uint8).view(torch.float8_e4m3fn)  # 2**-9
    layer = dataclasses.replace(layer, weight=tiny)
    x = make_x(5, 64, torch.bfloat16)
    want = layer(x)
    assert want.any()
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot be asked to flush subnormals")
        got = layer(x)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(got, want)
