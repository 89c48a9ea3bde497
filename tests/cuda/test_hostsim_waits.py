# SPDX-License-Identifier: Apache-2.0
"""Every barrier, wait for copies and fence of the kernels is needed, and its absence is seen: each
is left out in turn, and the simulator must report a fault."""

import functools
from collections.abc import Callable

import pytest
import sim_moe
import torch
from cuda_device import DeviceError, Rounding
from linear_cases import make_layer, make_x
from moe_cases import Shape, make_call, make_moe
from plans import FAMILIES, plan_of
from sim_device import ASCENDING, DESCENDING, Simulator

from vllm_plugin_tm.kernels.reference_moe import Activation

X = make_x(3, 640, torch.float16)


MMA, WGMMA = (tiles[0] for tiles in FAMILIES.values())


def _w4a16(sim: Simulator, slices: int, apart: bool, tile: int = MMA, group: int = 128) -> None:
    layer = make_layer("w4a16", 64, 640, group, torch.float16)
    packed = sim.pack(layer.codes, layer.scale, None, 640, 4)
    sim.w4a16_linear(X, packed, None, plan_of(packed.layout, tile, slices, apart))


def _w8a8(sim: Simulator, slices: int, apart: bool, tile: int = MMA) -> None:
    layer = make_layer("w8a8", 64, 640, -1, torch.float16)
    packed = sim.pack(layer.codes, layer.scale, None, 640, 8, width=8)
    sim.a8_linear(X, packed, None, plan_of(packed.layout, tile, slices, apart))


def _moe(sim: Simulator, gated: bool) -> None:
    activation = Activation("swiglu" if gated else "silu_no_mul")
    layer = make_moe("w4a16", Shape(2, 64, 16, -1), torch.float16, activation)
    sim_moe.run(sim, make_call(layer, 3, 2, torch.float16))


RUNS: tuple[Callable[[Simulator], None], ...] = (
    *(functools.partial(_w4a16, slices=s, apart=a) for s, a in ((1, False), (2, False), (2, True))),
    functools.partial(_w8a8, slices=2, apart=True),
    *(
        functools.partial(_w4a16, slices=1, apart=False, tile=WGMMA, group=group)
        for group in (32, 128)
    ),
    functools.partial(_w4a16, slices=1, apart=False, tile=FAMILIES["wgmma"][-1]),
    functools.partial(_w8a8, slices=2, apart=True, tile=WGMMA),
    lambda sim: sim.quantize(X, Rounding()) and None,
    functools.partial(_moe, gated=True),
    functools.partial(_moe, gated=False),
)


def _run_all(sim: Simulator) -> None:
    """In both orders: a block that waits for a later one would wait for ever."""
    for order in (ASCENDING, DESCENDING):
        sim.set_order(order)
        for run in RUNS:
            run(sim)


def test_every_wait_is_needed(simulated: Simulator) -> None:
    simulated.take_sites()
    _run_all(simulated)
    sites = simulated.take_sites()
    kinds = {site.split()[0] for site in sites}
    ordinary = {"sync_threads", "cp_async_wait", "thread_fence"}
    sm90 = {"sync_warp", "barrier_wait", "async_proxy_fence", "wgmma_fence", "wgmma_wait"}
    assert kinds == ordinary | sm90
    unseen = []
    for site in sites:
        with simulated.without(site):
            try:
                _run_all(simulated)
            except DeviceError:
                continue
        unseen.append(site)
    assert unseen == []


def test_with_all_of_them_nothing_is_reported(simulated: Simulator) -> None:
    """So what the test above sees is the place that it left out."""
    with simulated.without("sync_threads nowhere.h:1:1"):
        _run_all(simulated)


@pytest.mark.parametrize("run", RUNS)
def test_every_kernel_has_some(simulated: Simulator, run: Callable[[Simulator], None]) -> None:
    simulated.take_sites()
    run(simulated)
    assert len(simulated.take_sites()) >= 1
