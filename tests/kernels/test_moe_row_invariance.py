# SPDX-License-Identifier: Apache-2.0
"""A token's result is the same bits in every batch, at every place, on any number of threads."""

import concurrent.futures
from typing import Any

import pytest
import torch
from linear_cases import DTYPES, FLOATS, FP4, KEPT, pairwise
from moe_cases import (
    ACTIVATIONS,
    INTEGER_SCHEMES,
    ON_OWN_KERNELS,
    SCHEMES,
    Call,
    Shape,
    make_call,
    make_moe,
)
from x_views import MATRIX_VIEWS

from vllm_plugin_tm.kernels import ops

pytestmark = [pytest.mark.usefixtures("extension"), pytest.mark.slow]

# Experts get 0 to 20 rows, or, where all tokens choose the same, all of them: both sides of every
# register tile, and more than the 32 rows of a block of results.
BATCHES = (2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 41)
TOKENS = max(BATCHES)


def _grid(mode: str) -> list[dict[str, Any]]:
    sizes = [(40, 24, 8), (96, 136, 8), (160, 96, 32), (36, 33, -1)]
    experts = [(1, 1), (5, 3), (9, 4)]
    if mode in FLOATS:  # the drivers are those of integers: fewer will do
        sizes = [(40, 24, 8), (96, 136, 8), (40, 24, -1) if mode in FP4 else (36, 33, -1)]
        experts = experts[1:]
    return pairwise(
        size=sizes,
        experts=experts,
        dtype=DTYPES,
        activation=(ACTIVATIONS[1], ACTIVATIONS[-1]),
        routing=("spread", "one", "absent"),
        asymmetric=(False,) if mode == "w8a8" or mode in FLOATS else (False, True),
    )


def _name(case: dict[str, Any]) -> str:
    (hidden, intermediate, group), (experts, top_k) = case["size"], case["experts"]
    return (
        f"H{hidden}-I{intermediate}-g{group}-E{experts}-top{top_k}-{str(case['dtype'])[6:]}"
        f"-{case['activation'].name}-{case['routing']}{'-asym' if case['asymmetric'] else ''}"
    )


def _call(mode: str, case: dict[str, Any]) -> Call:
    (hidden, intermediate, group), (experts, top_k) = case["size"], case["experts"]
    layer = make_moe(
        mode,
        Shape(experts, hidden, intermediate, group),
        case["dtype"],
        case["activation"],
        case["asymmetric"],
        bias=True,
        long_x_groups=case["routing"] == "spread",
    )
    return make_call(layer, TOKENS, top_k, case["dtype"], case["routing"])


def _of(call: Call, tokens: Any) -> torch.Tensor:
    """The layer on some of the call's tokens."""
    return call.layer(call.x[tokens], call.topk_weights[tokens], call.topk_ids[tokens])


def _small(mode: str, dtype: torch.dtype, tokens: int = TOKENS, kind: str = "spread") -> Call:
    layer = make_moe(mode, Shape(6, 72, 40, 8), dtype, ACTIVATIONS[1], asymmetric=True, bias=True)
    return make_call(layer, tokens, 3, dtype, kind)


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
    """Every token alone, on one thread, against the batches it is part of, on one to three; and in
    a batch of another order."""
    call = _call(mode, case)
    torch.set_num_threads(1)
    alone = torch.cat([_of(call, slice(t, t + 1)) for t in range(TOKENS)])
    assert alone.isfinite().all()
    for number, tokens in enumerate(BATCHES):
        torch.set_num_threads(1 + number % 3)
        for first in {0, 1, (TOKENS - tokens) // 2, TOKENS - tokens}:
            part = slice(first, min(first + tokens, TOKENS))
            assert torch.equal(_of(call, part), alone[part]), f"tokens {part} differ from alone"
        order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(number))[:tokens]
        assert torch.equal(_of(call, order), alone[order]), f"tokens {order} differ from alone"


@pytest.mark.parametrize("kind", ["spread", "one", "few"])
@pytest.mark.parametrize("mode", SCHEMES)
def test_any_number_of_threads(isa: str, threads: None, mode: str, kind: str) -> None:
    """More threads than tiles of channels, and fewer; shares of the work that end within an expert
    and within its rows."""
    for number, tokens in enumerate((1, 3, 40, 300)):
        for hidden in (8, 272):
            dtype = DTYPES[number % 3]
            layer = make_moe(mode, Shape(6, hidden, 104, 8), dtype, asymmetric=True, bias=True)
            call = make_call(layer, tokens, 3, dtype, kind)
            results = []
            for count in (1, 2, 3, 8):
                torch.set_num_threads(count)
                results += [call(), call()]
            assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", SCHEMES)
def test_the_order_of_a_tokens_choices_is_no_matter(
    isa: str, mode: str, dtype: torch.dtype
) -> None:
    """Experts are added in their own order: other places for ids and weights, the same bits."""
    for tokens in (1, 9, TOKENS):
        for kind in ("spread", "absent"):
            call = _small(mode, dtype, tokens, kind)
            y = call()
            for seed in range(4):
                scores = torch.rand(tokens, 3, generator=torch.Generator().manual_seed(seed))
                order = scores.argsort(dim=1)
                weights, ids = call.topk_weights.gather(1, order), call.topk_ids.gather(1, order)
                assert torch.equal(call.layer(call.x, weights, ids), y)


@pytest.mark.parametrize("mode", SCHEMES)
def test_how_x_lies_in_memory_is_no_matter(isa: str, mode: str) -> None:
    """Rows read in place, copied, from an odd address: the same bits."""
    for dtype in DTYPES:
        for tokens in (1, 5, TOKENS):
            call = _small(mode, dtype, tokens)
            y = call()
            for view in MATRIX_VIEWS:
                assert torch.equal(call.layer(view(call.x), call.topk_weights, call.topk_ids), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", SCHEMES)
def test_a_token_does_not_see_its_neighbours(isa: str, mode: str, dtype: torch.dtype) -> None:
    """Other values, huge or NaN, in all other tokens, and other choices and weights of theirs,
    change nothing."""
    call = _small(mode, dtype)
    y = call()
    for filler in (0.0, torch.finfo(dtype).max, float("nan")):
        for token in (0, 1, 17, TOKENS - 1):
            x = torch.full_like(call.x, filler)
            x[token] = call.x[token]
            assert torch.equal(call.layer(x, call.topk_weights, call.topk_ids)[token], y[token])
            weights = torch.full_like(call.topk_weights, filler)
            ids = call.topk_ids.flip(0).clone()
            weights[token], ids[token] = call.topk_weights[token], call.topk_ids[token]
            assert torch.equal(call.layer(x, weights, ids)[token], y[token])


def test_two_python_threads_at_once(isa: str) -> None:
    """Re-entrant: calls of different ops and shapes at the same time give what they give alone."""
    jobs = []
    for seed, mode in enumerate((*SCHEMES, *SCHEMES[:3])):
        dtype, tokens = DTYPES[seed % 3], (1, 40, 3, 200, 9, 2, 33, 5)[seed % 8]
        shape = Shape(5 + seed, 96 + 8 * seed, 64, 8)
        activation = ACTIVATIONS[seed % len(ACTIVATIONS)]
        layer = make_moe(mode, shape, dtype, activation, asymmetric=bool(seed % 2), seed=seed)
        call = make_call(layer, tokens, 4, dtype)
        jobs.append((call, call()))

    def repeat(first: int) -> bool:
        return all(
            torch.equal(call(), alone)
            for turn in range(20)
            for call, alone in jobs[(first + turn) % 2 :: 2]
        )

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, range(4)))


@pytest.mark.parametrize(
    ("isa", "twin", "modes"),
    [
        ("avx512vnni", "avx512", KEPT + FLOATS),
        ("avxvnni", "avx2", KEPT + FLOATS),
        ("avx512bf16", "avx512vnni", tuple(m for m in INTEGER_SCHEMES if m not in KEPT)),
    ],
    indirect=["isa"],
)
def test_instruction_sets_without_kernels_of_their_own(
    isa: str, twin: str, modes: tuple[str, ...]
) -> None:
    """They run those of the next lower one; so what is tested on the one need not be on the
    other."""
    for mode in modes:
        assert (mode, isa) not in ON_OWN_KERNELS
        for dtype in DTYPES:
            for tokens in (1, TOKENS):
                call = _small(mode, dtype, tokens)
                ops.set_isa(isa)
                y = call()
                ops.set_isa(twin)
                assert torch.equal(call(), y)
