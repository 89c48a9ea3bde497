# SPDX-License-Identifier: Apache-2.0
"""A row's result is the same bits in every batch, at every place, on any number of threads."""

import concurrent.futures
from typing import Any

import pytest
import torch
from linear_cases import (
    DTYPES,
    FLOATS,
    FP4,
    KEPT,
    MODES,
    ON_OWN_KERNELS,
    OWN_KERNELS,
    W8A8,
    WITHOUT_ZERO_POINTS,
    assert_right,
    expected,
    make_layer,
    make_x,
    pairwise,
)
from x_views import VIEWS

from vllm_plugin_tm.kernels import ops

pytestmark = pytest.mark.usefixtures("extension")

# Both sides of every border: 1 to 9 rows of register tiles, 16 and 32 of AMX tiles, thread shares,
# and once and twice the 256 rows that the driver handles at a time.
BATCHES = (2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 31, 33, 64, 129, 255, 256, 257, 511, 513, 600)


def _grid(mode: str) -> list[dict[str, Any]]:
    groups = ((8, 24), (32, 96), (128, 640), (136, 272), (-1, 20), (-1, 333))
    return pairwise(
        group=groups[-2:] if mode in W8A8 else groups[:4] if mode in FP4 else groups,
        n=(1, 17, 48, 129),
        dtype=DTYPES,
        asymmetric=(False,) if mode in WITHOUT_ZERO_POINTS else (False, True),
        bias=(False, True),
    )


def _name(case: dict[str, Any]) -> str:
    group, k = case["group"]
    asymmetric = "asym" if case["asymmetric"] else "sym"
    return f"N{case['n']}-K{k}-g{group}-{str(case['dtype'])[6:]}-{asymmetric}"


@pytest.mark.parametrize(
    ("isa", "mode", "case"),
    [
        pytest.param(isa, mode, case, id=f"{isa}-{mode}-{_name(case)}")
        for mode, isa in ON_OWN_KERNELS
        for case in _grid(mode)
    ],
    indirect=["isa"],
)
def test_alone_and_in_any_batch(isa: str, threads: None, mode: str, case: dict[str, Any]) -> None:
    """Every row alone, on one thread, against the batches it is part of, on one to three."""
    group, k = case["group"]
    layer = make_layer(mode, case["n"], k, group, case["dtype"], case["asymmetric"], case["bias"])
    x = make_x(max(BATCHES), k, case["dtype"])
    torch.set_num_threads(1)
    alone = torch.cat([layer(row) for row in x.split(1)])
    for number, rows in enumerate(BATCHES):
        torch.set_num_threads(1 + number % 3)
        for first in {0, 1, (x.shape[0] - rows) // 2, x.shape[0] - rows}:
            part = slice(first, min(first + rows, x.shape[0]))
            assert torch.equal(layer(x[part]), alone[part]), f"rows {part} differ from alone"


@pytest.mark.parametrize("isa", OWN_KERNELS["w8a8"], indirect=True)
@pytest.mark.parametrize(("mode", "k"), [*((mode, 9001) for mode in W8A8), ("w4a8", 20008)])
def test_long_rows_of_codes(isa: str, threads: None, mode: str, k: int) -> None:
    """K so long that the driver cuts it into parts for many rows."""
    layer = make_layer(mode, 90, k, -1, torch.bfloat16, asymmetric=mode == "w4a8", bias=True)
    x = make_x(300, k, torch.bfloat16)
    alone = torch.cat([layer(row) for row in x[:40].split(1)])
    for rows in (8, 13, 40):
        assert torch.equal(layer(x[:rows]), alone[:rows])
    torch.set_num_threads(3)
    assert torch.equal(layer(x)[:40], alone)
    assert_right(layer(x[:13]), expected(layer, x[:13]))


@pytest.mark.parametrize("rows", [1, 3, 40, 600])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_any_number_of_threads(
    isa: str, threads: None, mode: str, dtype: torch.dtype, rows: int
) -> None:
    """Few and many channels: more threads than tiles, and fewer."""
    for n in (16, 33, 272):
        layer = make_layer(mode, n, 256, 64, dtype, asymmetric=True, bias=True)
        x = make_x(rows, 256, dtype)
        results = []
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results += [layer(x), layer(x)]
        assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("mode", MODES)
def test_how_x_lies_in_memory_is_no_matter(isa: str, mode: str) -> None:
    """Rows read in place, copied, from an odd address: the same bits."""
    for dtype in DTYPES:
        layer = make_layer(mode, 48, 96, 32, dtype, asymmetric=True)
        for rows in (1, 5, 40):
            x = make_x(rows, 96, dtype)
            y = layer(x)
            for view in VIEWS:
                assert torch.equal(layer(view(x)).view(rows, 48), y)


@pytest.mark.parametrize("mode", MODES)
def test_a_row_does_not_see_its_neighbours(isa: str, mode: str) -> None:
    """Other values, huge or NaN, in all other rows change nothing."""
    for dtype in DTYPES:
        layer = make_layer(mode, 48, 96, 32, dtype, asymmetric=True)
        x = make_x(40, 96, dtype)
        y = layer(x)
        for filler in (0.0, torch.finfo(dtype).max, float("nan")):
            for row in (0, 1, 17, 39):
                other = torch.full_like(x, filler)
                other[row] = x[row]
                assert torch.equal(layer(other)[row], y[row])


def test_two_python_threads_at_once(isa: str) -> None:
    """Re-entrant: calls of different ops and shapes at the same time give what they give alone."""
    jobs = []
    for seed, mode in enumerate(MODES):
        dtype, rows = DTYPES[seed % 3], (1, 40, 3, 600, 9, 2, 33, 5)[seed % 8]
        layer = make_layer(mode, 100, 256, 64, dtype, asymmetric=bool(seed % 2), seed=seed)
        x = make_x(rows, 256, dtype)
        jobs.append((layer, x, layer(x)))

    def repeat(first: int) -> bool:
        return all(
            torch.equal(layer(x), alone)
            for turn in range(20)
            for layer, x, alone in jobs[(first + turn) % 2 :: 2]
        )

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, range(4)))


@pytest.mark.parametrize(
    ("isa", "twin"), [("avx512vnni", "avx512"), ("avxvnni", "avx2")], indirect=["isa"]
)
@pytest.mark.parametrize("mode", KEPT + FLOATS)
def test_kept_activations_and_floats_do_not_use_vnni(isa: str, twin: str, mode: str) -> None:
    """An instruction set without kernels of its own runs those of the next lower one; so what is
    tested on the one need not be on the other."""
    assert isa not in OWN_KERNELS[mode]
    for dtype in DTYPES:
        layer = make_layer(mode, 48, 96, 32, dtype, asymmetric=True)
        for rows in (1, 40):
            x = make_x(rows, 96, dtype)
            ops.set_isa(isa)
            y = layer(x)
            ops.set_isa(twin)
            assert torch.equal(layer(x), y)
