# SPDX-License-Identifier: Apache-2.0
"""The W4A16 kernel on the simulator against the float64 oracle: every tile shape, awkward sizes,
addresses that are not aligned, slices of K, and the same bits for a row in every batch."""

import functools
from typing import Any

import pytest
import torch
from c_structs import Layout, Plan
from cuda_device import Device, DeviceError, Packed, Place
from linear_cases import (
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

from vllm_plugin_tm.kernels import ops, reference

DTYPES = (torch.float16, torch.bfloat16)
# (group size, K): one slab of 64 and several, half of one at the end, groups of two slabs, channels
# whose K is no multiple of anything.
GROUPS = (
    (32, 32),
    (32, 96),
    (32, 256),
    (64, 64),
    (64, 320),
    (128, 128),
    (128, 640),
    (192, 384),
    (-1, 1),
    (-1, 20),
    (-1, 100),
    (-1, 333),
    (-1, 512),
)
# Elements after each row of x and y, and bytes before the first.
PLACES = tuple(Place(*p) for p in ((0, 0), (8, 0), (8, 32), (1, 0), (0, 2), (3, 6)))


def _plan(tile: int, slabs: int, slices: int, apart: bool) -> Plan:
    return plan_of(Layout(1, 64 * slabs, 1), tile, slices, apart)


def _grid() -> list[dict[str, Any]]:
    return pairwise(
        group=GROUPS,
        rows=(1, 2, 5, 8, 9, 16, 17, 33),
        n=(1, 15, 16, 63, 64, 65, 130, 200),
        dtype=DTYPES,
        asymmetric=(False, True),
        bias=(False, True),
        place=PLACES,
        tile=range(TILES),
        slices=SLICES,
    )


GRID = _grid()


def _name(case: dict[str, Any]) -> str:
    group, k = case["group"]
    slices, apart = case["slices"]
    pad, shift = case["place"].pad, case["place"].shift
    return (
        f"M{case['rows']}-N{case['n']}-K{k}-g{group}-{str(case['dtype'])[6:]}"
        f"{'-asym' if case['asymmetric'] else ''}{'-bias' if case['bias'] else ''}-pad{pad}"
        f"-shift{shift}-tile{case['tile']}-{'apart' if apart else 'through'}{slices}"
    )


def _pack(sim: Device, layer: Layer) -> Packed:
    return sim.pack(layer.codes, layer.scale, layer.zero_point, layer.k, layer.bits)


def _slabs(k: int) -> int:
    return -(-k // 64)


def test_all_tiles_are_tested(sim: Device) -> None:
    assert sim.tiles == TILES
    for family, tiles in FAMILIES.items():
        assert sim.tiles_of(wgmma=family == "wgmma") == tiles
        sizes = [(sim.tile_rows(tile), sim.tile_channels(tile)) for tile in tiles]
        assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("case", GRID, ids=map(_name, GRID))
def test_against_the_oracle(sim: Device, case: dict[str, Any]) -> None:
    """Every pair of values of every two axes; and a scale error of 1 % would be seen."""
    (group, k), dtype, n = case["group"], case["dtype"], case["n"]
    layer = make_layer("w4a16", n, k, group, dtype, case["asymmetric"], case["bias"])
    x = make_x(case["rows"], k, dtype)
    plan = _plan(case["tile"], _slabs(k), *case["slices"])
    sim.needs_tile(plan.tile)
    sim.counts()
    y = sim.w4a16_linear(x, _pack(sim, layer), layer.bias, plan, case["place"])
    assert_right(y, expected(layer, x))
    counts = sim.counts()
    assert counts["wgmma" if plan.tile in FAMILIES["wgmma"] else "mma"] > 0
    assert counts["ldmatrix_conflicts"] == 0
    # One element alone may be all bias.
    if y.numel() >= 16:
        with pytest.raises(AssertionError):
            assert_right(y, expected(layer, x, scale_factor=1.01))


@functools.cache
def _large(dtype: torch.dtype, group: int) -> tuple[Layer, Tensor, Expected]:
    layer = make_layer("w4a16", 200, 640, group, dtype, True, True)
    x = make_x(150, 640, dtype)
    return layer, x, expected(layer, x)


@pytest.mark.parametrize("tiles", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("group", [32, 128, -1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_every_batch(
    sim: Device, dtype: torch.dtype, group: int, tiles: range
) -> None:
    """Whatever the number of rows, and with it the tile, and whether slices run apart or one block
    goes through all: the slices are the same, and so are the bits."""
    sim.needs_tile(tiles[0])
    layer, x, want = _large(dtype, group)
    packed = _pack(sim, layer)

    def run(x: Tensor, tile: int, apart: bool) -> Tensor:
        return sim.w4a16_linear(x, packed, layer.bias, _plan(tiles[tile], 10, 3, apart))

    alone = torch.cat([run(row, 0, True) for row in x[:9].split(1)])
    for tile, rows, apart in ((0, 7, True), (1, 16, True), (2, 9, False), (3, 64, True)):
        both = min(rows, 9)
        assert torch.equal(run(x[:rows], tile, apart)[:both], alone[:both])
    for tile in range(4, len(tiles)):
        whole = run(x, tile, False)
        assert torch.equal(whole[:9], alone)
        assert_right(whole, want)
    # At another place, beside other rows.
    y = run(x[:9].flip(0).contiguous(), 1, True)
    assert torch.equal(y.flip(0), alone)


def test_slices_decide_bits(sim: Device) -> None:
    """So the plan must not take them from the number of rows; and the test above can fail."""
    layer, x, _ = _large(torch.float16, 32)
    packed = _pack(sim, layer)
    one, three = (
        sim.w4a16_linear(x[:8], packed, None, _plan(0, 10, count, True)) for count in (1, 3)
    )
    assert not torch.equal(one, three)


@pytest.mark.parametrize("family", FAMILIES)
def test_plans(sim: Device, family: str) -> None:
    """Slices follow from the weights and the device, and end where groups do; the tile is the
    smallest of the device's that covers M."""
    tiles = FAMILIES[family]
    sizes = ((4096, 4096, 32), (14336, 4096, 128), (576, 1536, 1), (64, 64, 1), (256, 6144, 6))
    for n, k, groups in sizes:
        plans = {}
        for rows in (1, 8, 9, 16, 64, 65, 128, 1000, 100_000):
            plan = sim.plan(Layout(n, k, groups), rows, wgmma=family == "wgmma")
            plans[rows] = plan
            assert plan.tile in tiles
            covering = [tile for tile in tiles if sim.tile_rows(tile) >= rows]
            assert covering[:1] in ([], [plan.tile])
            length = plan.slice_slabs
            assert groups == 1 or length * 64 % (k // groups) == 0
            assert (plan.slices - 1) * length < _slabs(k) <= plan.slices * length
        assert len({(plan.slices, plan.slice_slabs) for plan in plans.values()}) == 1
        assert not plans[100_000].apart


def test_tiles_for_many_rows_follow_from_the_cost(sim: Device) -> None:
    """More rows than any tile covers: blocks that would leave multiprocessors without work are cut
    smaller, and where there is work for all the largest tile is the cheapest."""
    largest = sim.tile_rows(FAMILIES["mma"][-1])

    def rows_of(n: int, rows: int, multiprocessors: int) -> int:
        return sim.tile_rows(sim.plan(Layout(n, 512, 4), rows, multiprocessors, wgmma=False).tile)

    assert rows_of(4096, 100_000, 108) == largest
    # What 128 rows bring to a tile would take longer than their products.
    plan = sim.plan(Layout(4096, 4096, 32), 100_000, 132, wgmma=True)
    assert (sim.tile_channels(plan.tile), sim.tile_rows(plan.tile)) == (256, 64)
    # 16 tiles of 128 x 128 for 32 multiprocessors; of 128 x 64 there are 32.
    assert rows_of(1024, 256, 32) < largest
    assert rows_of(1024, 256, 16) == largest


@pytest.mark.parametrize("tiles", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("order", [DESCENDING, SHUFFLED])
def test_the_order_of_blocks_and_warps_is_no_matter(sim: Device, order: int, tiles: range) -> None:
    """Whichever slice comes last adds all of them, in the same order."""
    sim.needs_tile(tiles[0])
    layer, x, _ = _large(torch.bfloat16, 128)
    packed = _pack(sim, layer)
    plan = _plan(tiles[1], 10, 5, True)
    want = sim.w4a16_linear(x[:20], packed, layer.bias, plan)
    sim.set_order(order, seed=11)
    assert torch.equal(sim.w4a16_linear(x[:20], packed, layer.bias, plan, launches=3), want)


@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_and_zero_point_is_exact(
    sim: Device, dtype: torch.dtype, asymmetric: bool
) -> None:
    """x picks one k at a time: y is (code - zero point) itself, all 16 by all 16 of them."""
    layer = make_layer("w4a16", 96, 64, 32, dtype, asymmetric, seed=5).with_scale(1.0)
    weight = layer.real_weight()
    assert len(weight.unique()) == (31 if asymmetric else 16)
    y = sim.w4a16_linear(torch.eye(64, dtype=dtype), _pack(sim, layer), None, _plan(3, 1, 1, False))
    assert torch.equal(y.double(), weight.T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_and_weights_are_not_rounded(sim: Device, dtype: torch.dtype) -> None:
    """Weights c, -c, c, -c ... take differences of neighbours in x of one unit in the last place;
    scaled weights rounded to the dtype would leave nothing of them."""
    unit = torch.finfo(dtype).eps
    x = torch.ones(4, 64)
    x[:, ::2] += unit
    codes = torch.full((16, 64), 7).to(torch.int8)
    codes[:, 1::2] = -7
    scale = torch.full((16, 2), 1 + unit).to(dtype)
    layer = Layer("w4a16", 16, 64, 32, pack_bits(codes, 4), scale)
    y = sim.w4a16_linear(x.to(dtype), _pack(sim, layer), None, _plan(0, 1, 1, False))
    want = torch.full((4, 16), 7 * 32 * unit * (1 + unit), dtype=torch.float64)
    assert torch.equal(y, want.to(dtype))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_narrower_codes(sim: Device, bits: int) -> None:
    """Checkpoints of 2 and 3 bits run as 4 bits."""
    layer = make_layer("w4a16", 40, 96, 32, torch.float16, True, bits=bits)
    x = make_x(3, 96, torch.float16)
    y = sim.w4a16_linear(x, _pack(sim, layer), None, _plan(0, 2, 1, False))
    assert_right(y, expected(layer, x))


def test_codes_of_bytes(sim: Device) -> None:
    """int8 codes, as some checkpoints keep 4-bit weights, pack to the same bits."""
    layer = make_layer("w4a16", 70, 128, 64, torch.bfloat16)
    packed = _pack(sim, layer)
    codes = reference.unpack(layer.codes, 4, 128)
    twin = sim.pack(codes, layer.scale, None, 128, 4)
    assert torch.equal(twin.weight, packed.weight)
    assert torch.equal(twin.scale, packed.scale)


@pytest.mark.parametrize(("group", "k"), GROUPS)
@pytest.mark.parametrize("n", [1, 64, 200])
def test_the_fake_knows_the_layout(sim: Device, n: int, group: int, k: int) -> None:
    """Shapes that torch.compile is told, against what the packer writes."""
    layer = make_layer("w4a16", n, k, group, torch.float16, asymmetric=True)
    packed = _pack(sim, layer)
    shapes = ops.cuda_pack_shapes(n, k, layer.scale.shape[1])
    written = (packed.weight, packed.scale, packed.zero)
    assert [a * b for a, b in shapes] == [t.numel() for t in written if t is not None]


def test_no_rows(sim: Device) -> None:
    layer = make_layer("w4a16", 70, 128, 64, torch.bfloat16)
    y = sim.w4a16_linear(make_x(0, 128, torch.bfloat16), _pack(sim, layer), None, Plan(0, 1, 2))
    assert y.shape == (0, 70)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row(sim: Device, bad: float) -> None:
    layer, x, _ = _large(torch.float16, 128)
    packed = _pack(sim, layer)
    plan = _plan(1, 10, 3, True)
    clean = sim.w4a16_linear(x[:12], packed, layer.bias, plan)
    dirty = x[:12].clone()
    dirty[5, 300] = bad
    y = sim.w4a16_linear(dirty, packed, layer.bias, plan)
    others = torch.arange(12) != 5
    assert torch.equal(y[others], clean[others])
    assert not y[5][layer.real_weight()[:, 300] != 0].isfinite().any()


@pytest.mark.parametrize(
    ("n", "k", "groups", "reason"),
    [
        (64, 96, 6, "group size 16: expected 32, a multiple of 64, or all of k"),
        (64, 96, 2, "group size 48"),
        (64, 100, 3, "k = 100 is not cut evenly into 3 groups"),
    ],
)
def test_sizes_without_a_kernel_are_refused(
    sim: Device, n: int, k: int, groups: int, reason: str
) -> None:
    codes = torch.zeros(n, -(-k // 8), dtype=torch.int32)
    with pytest.raises(DeviceError, match=reason):
        sim.pack(codes, torch.ones(n, groups, dtype=torch.float16), None, k, 4)


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (Plan(TILES, 1, 2), "tile 11: expected 0 to 10"),
        (Plan(0, 1, 1), "1 slices of 1 slabs: they must cover 2 slabs"),
        (Plan(0, 3, 1), "none being empty"),
        (Plan(0, 0, 2), "0 slices"),
    ],
)
def test_plans_that_fit_not_are_refused(sim: Device, plan: Plan, reason: str) -> None:
    layer = make_layer("w4a16", 70, 128, 64, torch.bfloat16)
    with pytest.raises(DeviceError, match=reason):
        sim.w4a16_linear(make_x(1, 128, torch.bfloat16), _pack(sim, layer), None, plan)


def test_the_simulator_sees_an_x_that_is_too_short(simulated: Device) -> None:
    """What is tested here is tested with eyes open: rows that are not there are a fault."""
    layer = make_layer("w4a16", 70, 128, -1, torch.bfloat16)
    packed = _pack(simulated, layer)
    packed.layout.k = 192
    with pytest.raises(DeviceError, match=r"w4a16<bf16.*out of range"):
        simulated.w4a16_linear(make_x(1, 128, torch.bfloat16), packed, None, _plan(0, 3, 1, False))
