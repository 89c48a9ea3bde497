# SPDX-License-Identifier: Apache-2.0
"""Routed experts on the simulator against the float64 oracle: routing on the device, two products
over the tiles of all experts, with codes of x and of h rounded before each, the sum over them."""

import dataclasses
import functools
from typing import Any

import pytest
import sim_moe
import torch
from c_structs import SCHEMES
from cuda_device import Device, DeviceError, Place
from linear_cases import assert_right, pairwise
from moe_cases import ACTIVATIONS, Call, MoeLayer, Shape, make_call, make_moe
from plans import FAMILIES, TILES
from sim_device import DESCENDING, SHUFFLED
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16)
CODES = SCHEMES[1:]
GRID = pairwise(
    scheme=SCHEMES,
    shape=(
        Shape(1, 64, 16, -1),
        Shape(3, 100, 20, -1),
        Shape(5, 96, 64, 32),
        Shape(4, 128, 192, 64),
        Shape(6, 256, 128, 128),
    ),
    tokens=(1, 3, 17, 40),
    top_k=(1, 2, 3),
    kind=("spread", "one", "few", "absent"),
    dtype=DTYPES,
    activation=range(len(ACTIVATIONS)),
    asymmetric=(False, True),
    bias=(False, True),
    place=(Place(), Place(8, 32), Place(3, 6)),
    tile=(None, *range(TILES)),
)


def _name(case: dict[str, Any]) -> str:
    shape, a = case["shape"], ACTIVATIONS[case["activation"]]
    flags = "".join(f"-{flag}" for flag in ("asymmetric", "bias") if case[flag])
    return (
        f"{case['scheme']}-E{shape.experts}-H{shape.hidden}-I{shape.intermediate}-g{shape.group}-T{case['tokens']}"
        f"-k{case['top_k']}-{case['kind']}-{str(case['dtype'])[6:]}-{a.name}{case['activation']}"
        f"{flags}-pad{case['place'].pad}-tile{case['tile']}"
    )


@pytest.mark.parametrize("case", GRID, ids=map(_name, GRID))
def test_against_the_oracle(sim: Device, case: dict[str, Any]) -> None:
    """Every pair of values of every two axes; and a scale error of 1 % in either product would be
    seen."""
    shape, dtype = case["shape"], case["dtype"]
    layer = make_moe(
        case["scheme"],
        shape,
        dtype,
        ACTIVATIONS[case["activation"]],
        case["asymmetric"] and case["scheme"] != "w8a8",
        case["bias"],
        scale_dtype=torch.float32 if shape.group == -1 and case["bias"] else None,
    )
    call = make_call(layer, case["tokens"], min(case["top_k"], shape.experts), dtype, case["kind"])
    if case["tile"] is not None:
        sim.needs_tile(case["tile"])
    sim.counts()
    y = sim_moe.run(sim, call, tile=case["tile"], place=case["place"])
    assert_right(y, call.expected())
    assert sim.counts()["ldmatrix_conflicts"] == 0
    for factors in ({"w13": 1.01}, {"w2": 1.01}):
        with pytest.raises(AssertionError):
            assert_right(y, call.expected(**factors))


of_schemes = pytest.mark.parametrize("scheme", SCHEMES)


@functools.cache
def _layer(scheme: str = "w4a16") -> MoeLayer:
    shape = Shape(5, 128, 64, 32)
    return make_moe(scheme, shape, torch.float16, asymmetric=scheme != "w8a8", bias=True)


def _part(call: Call, tokens: slice) -> Call:
    return Call(
        call.layer, call.x[tokens], call.topk_weights[tokens], call.topk_ids[tokens].contiguous()
    )


@pytest.mark.parametrize("tiles", FAMILIES.values(), ids=FAMILIES)
@of_schemes
def test_a_token_has_the_same_bits_in_every_batch(sim: Device, scheme: str, tiles: range) -> None:
    """Alone, among others, on every tile of a device; and whatever the order of blocks."""
    sim.needs_tile(tiles[0])
    call = make_call(_layer(scheme), 40, 2, torch.float16)
    packed = sim_moe.pack_layer(sim, call.layer)

    def run(tokens: slice, tile: int) -> Tensor:
        return sim_moe.run(sim, _part(call, tokens), packed, tiles[tile])

    everything = slice(0, 40)
    whole = run(everything, 3)
    assert_right(whole, call.expected())
    for tile in range(len(tiles)):
        assert torch.equal(run(everything, tile), whole)
    for token in (0, 13, 39):
        assert torch.equal(run(slice(token, token + 1), 0), whole[token : token + 1])
    assert torch.equal(run(slice(5, 22), 1), whole[5:22])
    for order in (DESCENDING, SHUFFLED):
        sim.set_order(order, seed=7)
        assert torch.equal(run(everything, 2), whole)


@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
@of_schemes
def test_experts_that_are_elsewhere(sim: Device, scheme: str, wide: bool) -> None:
    """With a map of eight experts to the five that are here; ids that name none add nothing."""
    here = torch.tensor([-1, 3, 0, -1, 4, 1, -1, 2], dtype=torch.int32)
    layer = dataclasses.replace(_layer(scheme), expert_map=here)
    call = make_call(layer, 17, 3, torch.float16, kind="absent")
    ids = call.topk_ids.long() if wide else call.topk_ids
    given = dataclasses.replace(call, topk_ids=ids)
    y = sim_moe.run(sim, given)
    assert_right(y, call.expected())
    unknown = ids.clone()
    unknown[ids == -1] = 8
    unknown[0, 1] = -7
    absent = ids.clone()
    absent[0, 1] = -1
    y = sim_moe.run(sim, dataclasses.replace(given, topk_ids=unknown))
    want = sim_moe.run(sim, dataclasses.replace(given, topk_ids=absent))
    assert torch.equal(y, want)


@of_schemes
def test_a_token_without_experts_is_zero(sim: Device, scheme: str) -> None:
    call = make_call(_layer(scheme), 9, 2, torch.float16)
    call.topk_ids[3] = -1
    y = sim_moe.run(sim, call)
    assert not y[3].any()
    assert_right(y, call.expected())
    call.topk_ids[:] = -1
    assert not sim_moe.run(sim, call).any()


def test_many_choices(sim: Device) -> None:
    """More choices than threads sort, and experts without rows before and after those with some."""
    layer = make_moe("w4a16", Shape(7, 64, 16, -1), torch.bfloat16)
    call = make_call(layer, 150, 4, torch.bfloat16)
    call.topk_ids[call.topk_ids == 0] = -1
    call.topk_ids[call.topk_ids == 6] = -1
    assert_right(sim_moe.run(sim, call), call.expected())


def test_more_experts_than_threads(sim: Device) -> None:
    layer = make_moe("w4a16", Shape(300, 64, 16, -1), torch.float16)
    call = make_call(layer, 5, 6, torch.float16)
    assert_right(sim_moe.run(sim, call), call.expected())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@of_schemes
def test_what_is_not_finite_stays_in_its_token(sim: Device, scheme: str, bad: float) -> None:
    call = make_call(_layer(scheme), 9, 2, torch.float16)
    clean = sim_moe.run(sim, call)
    call.x[4, 100] = bad
    y = sim_moe.run(sim, call)
    others = torch.arange(9) != 4
    assert torch.equal(y[others], clean[others])
    assert not y[4].isfinite().any()


def test_no_tokens(sim: Device) -> None:
    assert sim_moe.run(sim, make_call(_layer(), 0, 2, torch.float16)).shape == (0, 128)


def test_what_does_not_fit_is_refused(sim: Device) -> None:
    call = make_call(_layer(), 3, 2, torch.float16)
    packed = sim_moe.pack_layer(sim, call.layer)
    with pytest.raises(DeviceError, match="tile 11: expected 0 to 10"):
        sim_moe.run(sim, call, packed, TILES)
    packed.w2.layout.n = 64
    with pytest.raises(DeviceError, match=r"w2: 4 bits \[64, 64\]: expected 4 bits \[128, 64\]"):
        sim_moe.run(sim, call, packed)


def test_scales_that_codes_do_not_take_are_refused(sim: Device) -> None:
    layer = make_moe("w4a8", Shape(3, 64, 64, 32), torch.float16, scale_dtype=torch.float32)
    with pytest.raises(
        DeviceError, match="w13: scale: expected 16 bits with groups, given float32"
    ):
        sim_moe.run(sim, make_call(layer, 3, 2, torch.float16))
    call = make_call(make_moe("w4a8", Shape(1, 8192, 16, -1), torch.float16), 1, 1, torch.float16)
    packed = sim_moe.pack_layer(sim, call.layer)
    packed.w13.layout.groups = 2
    with pytest.raises(
        DeviceError, match="w13: group size 4096: expected at most 2048, or all of k"
    ):
        sim_moe.run(sim, call, packed)


@pytest.mark.parametrize("scheme", CODES)
def test_large_sums_of_codes(sim: Device, scheme: str) -> None:
    """Every code at an end of its range."""
    layer = make_moe(scheme, Shape(2, 2048, 64, -1), torch.bfloat16)
    for weights in (layer.w13, layer.w2):
        weights.codes.fill_(0 if scheme == "w4a8" else -128)  # words of unsigned codes; bytes
        weights.scale.mul_(0.01)
    call = make_call(layer, 5, 2, torch.bfloat16)
    call.x[:2] = 1
    call.x[2:] = -1
    assert_right(sim_moe.run(sim, call), call.expected())
