# SPDX-License-Identifier: Apache-2.0
"""Packing gated experts, whose gate and up tiles alternate; and the hints about memory pages."""

import dataclasses
import os

import pytest
import torch
from linear_cases import Layer, make_layer, pack_bits
from op_check import opcheck

from vllm_plugin_tm.kernels import reference

pytestmark = pytest.mark.usefixtures("extension")

TILE_N, BLOCK_TILES = 16, 4  # csrc/cpu/layout.h


def _gate_up(layer: Layer) -> tuple[torch.Tensor, ...]:
    return getattr(torch.ops.vllm_plugin_tm, f"{layer.mode}_pack")(*layer.disk, gate_up=True)


def _rows(layer: Layer, rows: slice) -> Layer:
    """The layer of some of the output channels."""
    zero = layer.zero_point
    if zero is not None:
        values = reference.unpack(zero.t(), layer.bits, layer.n)[:, rows]
        zero = pack_bits(values, layer.bits).t().contiguous()
    part = {"codes": layer.codes[rows], "scale": layer.scale[rows], "zero_point": zero}
    return dataclasses.replace(layer, n=len(part["codes"]), **part)


def _tiles(part: torch.Tensor, tiles: int) -> list[torch.Tensor]:
    """A packed tensor as tiles [steps, what a tile has of a step]: blocks of up to 4 tiles, in each
    step by step, in a step tile by tile."""
    flat, out = part.flatten(), []
    per_tile = flat.numel() // tiles
    steps = part.shape[1] if part.dim() == 2 else 1
    for first in range(0, tiles, BLOCK_TILES):
        count = min(BLOCK_TILES, tiles - first)
        block = flat[first * per_tile : (first + count) * per_tile].view(steps, count, -1)
        out += block.unbind(1)
    return out


@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("intermediate", [1, 15, 16, 17, 40, 65, 136])
@pytest.mark.parametrize(
    ("mode", "bits"),
    [("w4a16", 4), ("w4a16", 3), ("w8a16", 8), ("w8a16", 5), ("w8a8", 8)],
)
def test_gate_and_up_tiles_alternate(
    mode: str, bits: int, intermediate: int, asymmetric: bool
) -> None:
    """Packing both at once is packing each alone and putting their tiles in turn, padding too."""
    if mode == "w8a8" and asymmetric:
        pytest.skip("w8a8 has no zero points of weights")
    for k, group in ((24, 8), (96, 32), (37, -1)):
        layer = make_layer(mode, 2 * intermediate, k, group, torch.bfloat16, asymmetric, bits=bits)
        gate = _rows(layer, slice(intermediate)).packed
        up = _rows(layer, slice(intermediate, None)).packed
        tiles = -(-intermediate // TILE_N)
        for both, one, other in zip(_gate_up(layer), gate, up, strict=True):
            if one is None:
                assert both.numel() == 0
                continue
            assert both.shape[0] == 2 * one.shape[0]
            assert both.shape[1:] == one.shape[1:]
            assert both.dtype == one.dtype
            alternate = zip(_tiles(one, tiles), _tiles(other, tiles), strict=True)
            want = [tile for pair in alternate for tile in pair]
            assert all(map(torch.equal, _tiles(both, 2 * tiles), want))


@pytest.mark.parametrize("mode", ["w4a16", "w8a16", "w8a8"])
def test_gate_and_up_must_be_as_many(mode: str) -> None:
    """An odd number of rows has no halves."""
    argument = "weight" if mode == "w8a8" else "weight_packed"
    layer = make_layer(mode, 33, 64, 32, torch.bfloat16, asymmetric=True)
    message = rf"{mode}_pack: argument '{argument}': expected as many gate as up rows, given 33"
    with pytest.raises(RuntimeError, match=message):
        _gate_up(layer)


@pytest.mark.parametrize("mode", ["w4a16", "w8a16", "w8a8"])
def test_opcheck_gate_up(mode: str) -> None:
    """The fake knows that gates and ups are padded apart: 2 * 20 rows become 64 channels."""
    layer = make_layer(mode, 40, 64, 32, torch.bfloat16, asymmetric=True)
    assert _gate_up(layer)[0].shape[0] == 64
    pack = getattr(torch.ops.vllm_plugin_tm, f"{mode}_pack").default
    opcheck(pack, layer.disk, {"gate_up": True})


def _resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_released_pages_are_given_back() -> None:
    """What lies within is gone from memory and may be written again; what lies beside, on the pages
    of both ends, stays."""
    size, page = 64 * 2**20, os.sysconf("SC_PAGE_SIZE")
    memory = torch.full((size,), 7, dtype=torch.uint8)
    before = _resident_bytes()
    torch.ops.vllm_plugin_tm.release_pages(memory[100:-100])
    assert before - _resident_bytes() > size - 4 * 2**20  # other threads may take some
    for end in (memory[:100], memory[-100:]):
        assert (end == 7).all()
    assert (memory[2 * page : -2 * page] == 0).all()
    memory.fill_(9)
    assert (memory == 9).all()


@pytest.mark.parametrize("count", [0, 1, 100])
def test_less_than_a_page_stays(count: int) -> None:
    """No whole page lies within: nothing is given back."""
    memory = torch.full((count,), 7, dtype=torch.uint8)
    torch.ops.vllm_plugin_tm.release_pages(memory)
    assert (memory == 7).all()


def test_release_pages_refuses_a_view_with_gaps() -> None:
    """The gaps may be another's."""
    memory = torch.full((64, 4096), 7, dtype=torch.int32)
    for view in (memory[:, :-1], memory.t(), memory[:, ::2], memory[:1].expand(64, -1)):
        with pytest.raises(RuntimeError, match=r"release_pages: argument 'memory': .*contiguous"):
            torch.ops.vllm_plugin_tm.release_pages(view)
    assert (memory == 7).all()


def test_advice_keeps_contents() -> None:
    """A hint changes no byte, whatever the size and the address."""
    for size in (0, 1, 4096, 5 * 2**20 + 3):
        memory = torch.randint(0, 256, (size,), dtype=torch.uint8)
        want = memory.clone()
        for view in (memory, memory[1:], memory[::3]):
            torch.ops.vllm_plugin_tm.advise_huge_pages(view)
        assert torch.equal(memory, want)


@pytest.mark.parametrize("name", ["advise_huge_pages", "release_pages"])
def test_page_hints_refuse_another_device(name: str) -> None:
    with pytest.raises(RuntimeError, match=rf"{name}: argument 'memory': expected a tensor on the"):
        getattr(torch.ops.vllm_plugin_tm, name)(torch.empty(4096, device="meta"))
