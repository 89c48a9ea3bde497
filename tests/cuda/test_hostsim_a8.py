# SPDX-License-Identifier: Apache-2.0
"""The kernels with int8 activations, W8A8 and W4A8, on the simulator against the float64 oracle,
and the kernel that rounds activations against compressed-tensors' definition."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from c_structs import Plan
from cuda_device import Device, DeviceError, Packed, Place, Rounding
from linear_cases import (
    W8A8,
    X_SCALE,
    X_ZERO_POINT,
    Expected,
    Layer,
    assert_right,
    expected,
    make_layer,
    make_x,
    pack_bits,
    pairwise,
)
from plans import FAMILIES, SLICES, TILES, plan_of
from sim_device import DESCENDING, SHUFFLED
from torch import Tensor

from vllm_plugin_tm.kernels import ops, reference_int8

MODES = (*W8A8, "w4a8")
DTYPES = (torch.float16, torch.bfloat16)
PLACES = tuple(Place(*p) for p in ((0, 0), (8, 0), (8, 32), (1, 0), (0, 2), (3, 6)))
K = (1, 20, 64, 100, 333, 512)
GROUPS = ((32, 32), (32, 96), (32, 256), (64, 64), (64, 320), (128, 384), (192, 384))
GROUPS += ((-1, 20), (-1, 333))
SHARED_AXES = {
    "rows": (1, 5, 8, 9, 17, 33),
    "n": (1, 16, 63, 65, 130, 200),
    "dtype": DTYPES,
    "bias": (False, True),
    "place": PLACES,
    "tile": range(TILES),
    "slices": SLICES,
}
W8A8_GRID = pairwise(mode=W8A8, group=[(-1, k) for k in K], asymmetric=(False,), **SHARED_AXES)
W4A8_GRID = pairwise(mode=("w4a8",), group=GROUPS, asymmetric=(False, True), **SHARED_AXES)
GRID = W8A8_GRID + W4A8_GRID


def _name(case: dict[str, Any]) -> str:
    group, k = case["group"]
    slices, apart = case["slices"]
    place = case["place"]
    return (
        f"{case['mode']}-M{case['rows']}-N{case['n']}-K{k}-g{group}-{str(case['dtype'])[6:]}"
        f"{'-asym' if case['asymmetric'] else ''}{'-bias' if case['bias'] else ''}-pad{place.pad}"
        f"-shift{place.shift}-tile{case['tile']}-{'apart' if apart else 'through'}{slices}"
    )


def _pack(sim: Device, layer: Layer) -> Packed:
    if layer.op == "w8a8":
        return sim.pack(layer.codes, layer.scale, None, layer.k, 8, width=8)
    return sim.pack(layer.codes, layer.scale, layer.zero_point, layer.k, layer.bits)


def _rounding(layer: Layer) -> Rounding:
    return Rounding(layer.mode != "w8a8_asym", layer.x_scale, layer.x_zero_point)


def _run(
    sim: Device,
    layer: Layer,
    x: Tensor,
    tile: int = 0,
    slices: tuple[int, bool] = (1, False),
    packed: Packed | None = None,
    **more: Any,
) -> Tensor:
    packed = packed or _pack(sim, layer)
    plan = plan_of(packed.layout, tile, *slices, whole_groups=True)
    return sim.a8_linear(x, packed, layer.bias, plan, _rounding(layer), **more)


@pytest.mark.parametrize("case", GRID, ids=map(_name, GRID))
def test_against_the_oracle(sim: Device, case: dict[str, Any]) -> None:
    """Every pair of values of every two axes; and a scale error of 1 % would be seen."""
    (group, k), dtype, n = case["group"], case["dtype"], case["n"]
    layer = make_layer(case["mode"], n, k, group, dtype, case["asymmetric"], case["bias"])
    assert isinstance(layer, Layer)
    x = make_x(case["rows"], k, dtype)
    sim.needs_tile(case["tile"])
    sim.counts()
    y = _run(sim, layer, x, case["tile"], case["slices"], place=case["place"])
    assert_right(y, expected(layer, x))
    counts = sim.counts()
    assert counts["wgmma" if case["tile"] in FAMILIES["wgmma"] else "mma"] > 0
    assert counts["ldmatrix_conflicts"] == 0
    # One element alone may be all bias.
    if y.numel() >= 16:
        with pytest.raises(AssertionError):
            assert_right(y, expected(layer, x, scale_factor=1.01))


# Of each kernel: groups of 32, whole slabs, one for all of K; and 8-bit weights with zero points.
KERNELS = (("w4a8", 32), ("w4a8", 128), ("w4a8", -1), ("w8a8_asym", -1))


@functools.cache
def _large(mode: str, group: int, dtype: torch.dtype) -> tuple[Layer, Tensor, Expected]:
    layer = make_layer(mode, 200, 640, group, dtype, mode == "w4a8", True)
    assert isinstance(layer, Layer)
    x = make_x(150, 640, dtype)
    return layer, x, expected(layer, x)


@pytest.mark.parametrize("tiles", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize(("mode", "group"), KERNELS)
def test_a_row_has_the_same_bits_in_every_batch(
    sim: Device, mode: str, group: int, tiles: range
) -> None:
    """Whatever the number of rows, and with it the tile, whether slices run apart or one block goes
    through all, and beside whichever rows."""
    sim.needs_tile(tiles[0])
    layer, x, want = _large(mode, group, torch.float16)
    packed = _pack(sim, layer)
    run = functools.partial(_run, sim, layer, packed=packed)
    alone = torch.cat([run(row, tiles[0], (3, True)) for row in x[:9].split(1)])
    for tile, rows, apart in ((0, 7, True), (1, 16, True), (2, 9, False), (3, 64, True)):
        y = run(x[:rows], tiles[tile], (3, apart))
        both = min(rows, 9)
        assert torch.equal(y[:both], alone[:both])
    for tile in tiles[4:]:
        whole = run(x, tile, (3, False))
        assert torch.equal(whole[:9], alone)
        assert_right(whole, want)
    y = run(x[:9].flip(0).contiguous(), tiles[1], (3, True))
    assert torch.equal(y.flip(0), alone)


@pytest.mark.parametrize("mode", ["w4a8", "w8a8_asym"])
def test_slices_of_integers_are_exact(sim: Device, mode: str) -> None:
    """Without groups sums stay integers, and the slices do not show in a result."""
    layer, x, _ = _large(mode, -1, torch.float16)
    packed = _pack(sim, layer)
    whole = _run(sim, layer, x[:12], 1, packed=packed)
    for slices in SLICES:
        assert torch.equal(_run(sim, layer, x[:12], 1, slices, packed), whole)


@pytest.mark.parametrize("order", [DESCENDING, SHUFFLED])
def test_the_order_of_blocks_and_warps_is_no_matter(sim: Device, order: int) -> None:
    for mode, group in (("w4a8", 128), ("w8a8_asym", -1)):
        layer, x, _ = _large(mode, group, torch.bfloat16)
        want = _run(sim, layer, x[:20], 1, (5, True))
        sim.set_order(order, seed=11)
        assert torch.equal(_run(sim, layer, x[:20], 1, (5, True), launches=3), want)
        sim.set_order(0)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize(
    ("mode", "group", "asymmetric"),
    [*((mode, -1, False) for mode in W8A8)]
    + [("w4a8", group, asym) for group in (32, 64, -1) for asym in (False, True)],
)
def test_the_cpu_has_the_same_bits(sim: Device, mode: str, group: int, asymmetric: bool) -> None:
    """One slice is the order in which the CPU's kernels add; integers are exact on both."""
    for dtype in DTYPES:
        layer = make_layer(mode, 83, 320, group, dtype, asymmetric, bias=True)
        assert isinstance(layer, Layer)
        x = make_x(20, 320, dtype) * torch.logspace(-3, 1, 20).unsqueeze(1).to(dtype)
        assert torch.equal(_run(sim, layer, x, 2), layer(x))


@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("group", [32, 64, -1])
def test_every_code_and_zero_point_is_exact(sim: Device, group: int, asymmetric: bool) -> None:
    """x picks one k at a time, with a code of 127: all 16 codes less all 16 zero points."""
    layer = make_layer("w4a8", 96, 64, group, torch.float16, asymmetric, seed=5)
    assert isinstance(layer, Layer)
    layer = layer.with_scale(2.0**-6)
    weight = layer.real_weight() * 2**6
    assert len(weight.unique()) == (31 if asymmetric else 16)
    y = _run(sim, layer, torch.eye(64, dtype=torch.float16), 3)
    steps = (127 * weight.T).float() * 2.0**-6 * torch.tensor(1 / 127.5)
    assert torch.equal(y, steps.half())


def _codes_cases() -> list[Tensor]:
    """Rows [., 100]: ties between codes for scales that are powers of two, symmetric ranges of
    127.5 and asymmetric ones of 255; numbers of all sizes; one sign only; zeros; subnormals."""
    halves = torch.arange(0.5, 98.0)
    ends = ((127.5, -127.5), (-126.5, 128.5), (-0.5, 254.5), (-254.5, 0.5), (-64.5, 190.5))
    ties = torch.stack([torch.cat((torch.tensor(pair), halves)) for pair in ends])
    wide = make_x(40, 100, torch.float32) * torch.logspace(-3, 0.7, 40).unsqueeze(1)
    tiny = make_x(4, 100, torch.float32) * 2.0**-20
    return [torch.cat([ties * 2.0**p for p in (-9, 0, 7)]), wide, wide.abs(), -wide.abs(), tiny]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "rounding",
    [
        Rounding(),
        Rounding(symmetric=False),
        Rounding(True, torch.tensor([X_SCALE])),
        Rounding(True, torch.tensor([0.25]), torch.tensor([X_ZERO_POINT], dtype=torch.int32)),
        Rounding(True, torch.tensor([0.013]), torch.tensor([127], dtype=torch.int32)),
    ],
    ids=["token", "token-asym", "tensor", "tensor-asym", "tensor-asym-edge"],
)
def test_codes_are_those_of_the_definition(
    sim: Device, rounding: Rounding, dtype: torch.dtype
) -> None:
    """Codes, scales and zero points, bit for bit; rows of zeros and of zeros but one too."""
    rows = torch.cat(_codes_cases()).to(dtype)
    rows[-1] = 0
    rows[-2] = 0
    rows[-2, 99] = 3
    if rounding.scale is None:
        want = reference_int8.quantize_x(rows, rounding.symmetric)
    else:
        want = reference_int8.quantize_x_static(rows, rounding.scale, rounding.zero_point)
    for place in (Place(), Place(4, 0), Place(3, 2)):
        codes, scale, zero = sim.quantize(rows, rounding, place)
        assert torch.equal(scale, want.scale.squeeze(-2))
        assert torch.equal(zero.float(), want.zero_point.squeeze(-2))
        assert torch.equal(codes.float(), want.codes.squeeze(-2))


def _ends(rows: int, k: int) -> Tensor:
    """Rows that are all at one end, at the other, and alternating by element and by pair."""
    x = torch.ones(rows, k)
    x[1::4] = -1
    x[2::4, ::2] = -1
    x[3::4] = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(k // 4)
    return x.half()


def _ends_layers(mode: str, k: int) -> list[Layer]:
    most = 8 if mode == "w4a8" else 128
    codes = torch.full((4, k), -most, dtype=torch.int8)
    codes[1::4] = most - 1
    codes[2::4, 1::2] = most - 1
    codes[3::4, ::3] = most - 1
    scale = torch.full((4, 1), 1e-6)
    if mode == "w4a8":
        zeros = [None, *(pack_bits(torch.full((1, 4), z), 4).t().contiguous() for z in (-8, 7))]
        return [Layer(mode, 4, k, -1, pack_bits(codes, 4), scale, zero) for zero in zeros]
    layer = Layer(mode, 4, k, -1, codes, scale, bits=8)
    if "static" not in mode:
        return [layer]
    points = (-128, 127) if mode.endswith("asym") else (None,)
    return [
        dataclasses.replace(
            layer,
            x_scale=torch.tensor([1e-4]),
            x_zero_point=None if z is None else torch.tensor([z], dtype=torch.int32),
        )
        for z in points
    ]


@pytest.mark.parametrize("mode", MODES)
def test_no_overflow(sim: Device, mode: str) -> None:
    """K = 65536 with all codes at their ends: sums of up to 65536 * 255 * 128 < 2**31."""
    k = 65536
    x = _ends(4, k)
    for layer in _ends_layers(mode, k):
        assert_right(_run(sim, layer, x, 0, (3, True)), expected(layer, x))


@pytest.mark.parametrize("zero", [None, -8, 7])
def test_the_longest_group_is_exact(sim: Device, zero: int | None) -> None:
    """Two groups of 2048, all codes at their ends: the integers that become floats by their bits
    are the largest there are, and scales of 1 show each of them."""
    k = 4096
    layer = _ends_layers("w4a8", k)[0]
    zeros = None if zero is None else pack_bits(torch.full((2, 4), zero), 4).t().contiguous()
    scale = torch.tensor([1.0, 2.0**-12]).expand(4, 2).half().contiguous()
    layer = dataclasses.replace(layer, group_size=2048, scale=scale, zero_point=zeros)
    x = _ends(4, k) * 2.0**-13
    assert_right(_run(sim, layer, x), expected(layer, x))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_finite_stays_in_its_row(sim: Device, mode: str, bad: float) -> None:
    """The row has no finite output, and no other row is touched. With a given scale an infinity is
    the outermost code."""
    layer = make_layer(mode, 70, 100, -1, torch.float16)
    assert isinstance(layer, Layer)
    x = make_x(9, 100, torch.float16)
    clean = _run(sim, layer, x)
    x[4, 97] = bad
    y = _run(sim, layer, x)
    others = torch.arange(9) != 4
    assert torch.equal(y[others], clean[others])
    if layer.x_scale is not None and bad == bad:
        assert_right(y, expected(layer, x))
    else:
        assert not y[4].isfinite().any()


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scales_of_any_dtype(sim: Device, scale_dtype: torch.dtype) -> None:
    """W4A8 takes scales as the checkpoint has them: of 4 bytes without groups only."""
    for group in (-1, 32, 64):
        layer = make_layer("w4a8", 70, 128, group, torch.bfloat16, scale_dtype=scale_dtype)
        assert isinstance(layer, Layer)
        x = make_x(3, 128, torch.bfloat16)
        if group != -1 and scale_dtype == torch.float32:
            with pytest.raises(DeviceError, match="expected 16 bits with groups"):
                _run(sim, layer, x)
        else:
            assert_right(_run(sim, layer, x), expected(layer, x))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (64, 64), (200, 333)])
def test_the_fake_knows_the_layout(sim: Device, n: int, k: int) -> None:
    """Shapes that torch.compile is told, against what the packer writes."""
    layer = make_layer("w8a8", n, k, -1, torch.float16)
    assert isinstance(layer, Layer)
    packed = _pack(sim, layer)
    weight, scale, _ = ops.cuda_pack_shapes(n, k, 1, bits=8)
    assert packed.sums is not None
    assert weight[0] * weight[1] == packed.weight.numel()
    assert scale[0] * scale[1] == packed.scale.numel()
    assert weight[0] == packed.sums.numel()


def test_no_rows(sim: Device) -> None:
    layer = make_layer("w8a8", 70, 128, -1, torch.bfloat16)
    assert isinstance(layer, Layer)
    assert _run(sim, layer, make_x(0, 128, torch.bfloat16)).shape == (0, 70)


def test_sizes_without_a_kernel_are_refused(sim: Device) -> None:
    codes = torch.zeros(64, 128, dtype=torch.int8)
    with pytest.raises(DeviceError, match="2 groups: weights of 8 bits have one"):
        sim.pack(codes, torch.ones(64, 2), None, 128, 8, width=8)
    layer = make_layer("w4a8", 16, 8192, 4096, torch.float16)
    assert isinstance(layer, Layer)
    with pytest.raises(DeviceError, match="group size 4096: expected at most 2048"):
        _run(sim, layer, make_x(1, 8192, torch.float16))
    layer = make_layer("w8a8", 16, 128, -1, torch.float16)
    assert isinstance(layer, Layer)
    packed = _pack(sim, layer)
    for symmetric, most in ((True, 131071), (False, 65793)):
        packed.layout.k = most + 1
        plan = Plan(0, 1, -(-packed.layout.k // 64))
        with pytest.raises(DeviceError, match=f"k = {most + 1}: expected at most {most}"):
            sim.a8_linear(make_x(1, 128, torch.float16), packed, None, plan, Rounding(symmetric))
