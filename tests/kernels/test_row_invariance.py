# SPDX-License-Identifier: Apache-2.0
"""A row's result is the same bits in every batch, at every place, on any number of threads."""

import concurrent.futures

import pytest
import torch
from w4a16_cases import DTYPES, make_layer, make_x, pairwise

pytestmark = pytest.mark.usefixtures("extension")

# Both sides of every border: 1 to 9 rows of register tiles, thread shares, and once and twice the
# 256 rows that the driver handles at a time.
BATCHES = (2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 31, 64, 129, 255, 256, 257, 511, 513, 600)
GRID = pairwise(
    group=((8, 24), (32, 96), (64, 192), (128, 640), (136, 272), (-1, 20), (-1, 320)),
    n=(1, 17, 48, 100, 129),
    dtype=DTYPES,
    asymmetric=(False, True),
    bias=(False, True),
)


def _name(case: dict) -> str:
    group, k = case["group"]
    asymmetric = "asym" if case["asymmetric"] else "sym"
    return f"N{case['n']}-K{k}-g{group}-{str(case['dtype'])[6:]}-{asymmetric}"


@pytest.mark.parametrize("case", GRID, ids=_name)
def test_alone_and_in_any_batch(isa: str, threads: None, case: dict) -> None:
    """Every row alone, on one thread, against the batches it is part of, on one to three."""
    group, k = case["group"]
    layer = make_layer(case["n"], k, group, case["dtype"], case["asymmetric"], case["bias"])
    x = make_x(max(BATCHES), k, case["dtype"])
    torch.set_num_threads(1)
    alone = torch.cat([layer(row) for row in x.split(1)])
    for number, rows in enumerate(BATCHES):
        torch.set_num_threads(1 + number % 3)
        for first in {0, 1, (x.shape[0] - rows) // 2, x.shape[0] - rows}:
            part = slice(first, min(first + rows, x.shape[0]))
            assert torch.equal(layer(x[part]), alone[part]), f"rows {part} differ from alone"


@pytest.mark.parametrize("rows", [1, 3, 40, 600])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads(isa: str, threads: None, dtype: torch.dtype, rows: int) -> None:
    """Few and many channels: more threads than tiles, and fewer."""
    for n in (16, 33, 272):
        layer = make_layer(n, 256, 64, dtype, asymmetric=True, bias=True)
        x = make_x(rows, 256, dtype)
        results = []
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results += [layer(x), layer(x)]
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_how_x_lies_in_memory_is_no_matter(isa: str) -> None:
    """Rows read in place, copied, from an odd address: the same bits."""
    for dtype in DTYPES:
        layer = make_layer(48, 96, 32, dtype, asymmetric=True)
        for rows in (1, 5, 40):
            x = make_x(rows, 96, dtype)
            wide = torch.zeros(rows, 101, dtype=dtype)
            wide[:, 3:-2] = x
            y = layer(x)
            for other in (wide[:, 3:-2], x.t().contiguous().t(), x.view(rows, 1, 96)):
                assert torch.equal(layer(other).view(rows, 48), y)


def test_a_row_does_not_see_its_neighbours(isa: str) -> None:
    """Other values, huge or NaN, in all other rows change nothing."""
    for dtype in DTYPES:
        layer = make_layer(48, 96, 32, dtype, asymmetric=True)
        x = make_x(40, 96, dtype)
        y = layer(x)
        for filler in (0.0, torch.finfo(dtype).max, float("nan")):
            for row in (0, 1, 17, 39):
                other = torch.full_like(x, filler)
                other[row] = x[row]
                assert torch.equal(layer(other)[row], y[row])


def test_two_python_threads_at_once(isa: str) -> None:
    """Re-entrant: calls of different shapes at the same time give what they give alone."""
    jobs = []
    for seed, (dtype, rows) in enumerate(zip(DTYPES * 2, (1, 40, 3, 600, 9, 2), strict=True)):
        layer = make_layer(100, 256, 64, dtype, asymmetric=bool(seed % 2), seed=seed)
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
