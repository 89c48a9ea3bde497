# SPDX-License-Identifier: Apache-2.0
"""A run on linear layers: prepare each matrix, gate, time in turns beside the limits, collect."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch

from vllm_plugin_tm import heap
from vllm_plugin_tm.bench import guard, peers, results, rounds, timing, upstream
from vllm_plugin_tm.bench.cases import OURS, OURS_SYMMETRIC, TORCH, UPSTREAM, UPSTREAM_W8A8, Case
from vllm_plugin_tm.bench.weights import DTYPES, Weights, random_weights, tensor_bytes


@dataclass(frozen=True, kw_only=True)
class Plan(rounds.Plan):
    """What to run.

    `more` makes further peers from (weights, bytes of the last-level cache); it may raise
    peers.UnavailableError.
    """

    cases: tuple[Case, ...]
    more: tuple[Callable[[Weights, int], peers.Peer], ...] = ()


def run(plan: Plan, progress: rounds.Progress = lambda done, total, label: None) -> results.Report:
    """Measures the plan.

    Raises:
        ops.ExtensionMissingError: the limit loops and our kernel are in the extension.
        guard.WrongResultError: our kernel's result is wrong; a peer's is skipped and listed.
    """
    return rounds.report(plan, partial(_measure_all, plan, progress))


def _measure_all(plan: Plan, progress: rounds.Progress, run: rounds.Run) -> None:
    done = 0
    for cases in _by_matrix(plan.cases):
        _measure_matrix(cases, plan, progress, run, done)
        heap.trim()
        done += len(cases)
    progress(done, len(plan.cases), "limits again")


def _measure_matrix(
    cases: list[Case], plan: Plan, progress: rounds.Progress, run: rounds.Run, done: int
) -> None:
    """Cases of one matrix. All of its weights are gone afterwards: beside a large cache a kernel's
    copies take gigabytes."""
    first = cases[0]
    label = f"{first.n}x{first.k}, {first.format.name}"
    progress(done, len(plan.cases), label)
    weights = random_weights(first.n, first.k, first.format)
    if OURS in plan.kernels:
        run.packing.append(_pack(first, weights, run.llc_bytes, plan.effort))
    everyone = list(run.available(_makers(plan, weights, run.llc_bytes)))
    for peer in everyone:
        peer.read_once(torch.zeros(1, weights.k, dtype=weights.dtype))
    for place, case in enumerate(cases, done):
        progress(place, len(plan.cases), f"{label}, M={case.m}")
        _measure(case, everyone, run)


def _by_matrix(cases: tuple[Case, ...]) -> Iterator[list[Case]]:
    """Cases that share a weight matrix, which is made once for all of them."""
    for _, same in groupby(cases, key=lambda case: (case.n, case.k, case.format)):
        yield list(same)


def _makers(plan: Plan, weights: Weights, llc: int) -> Iterator[Callable[[], peers.Peer]]:
    if OURS in plan.kernels:
        for isa in plan.isas:
            yield partial(peers.ours, weights, isa, llc)
        if not weights.format.symmetric:
            yield partial(peers.ours, weights.symmetric(), plan.isas[0], llc, OURS_SYMMETRIC)
    beside = UPSTREAM_W8A8 in plan.kernels and weights.format.scheme == "w4a8"
    makers = [
        *([upstream.upstream] if UPSTREAM in plan.kernels else []),
        *([upstream.upstream_w8a8] if beside else []),
        *([peers.torch_linear] if TORCH in plan.kernels else []),
        *plan.more,
    ]
    yield from (partial(make, weights, llc) for make in makers)


def _measure(case: Case, everyone: list[peers.Peer], run: rounds.Run) -> None:
    generator = torch.Generator().manual_seed(case.m)
    x = torch.randn(case.m, case.k, generator=generator).to(DTYPES[case.format.dtype])
    able = [peer for peer in everyone if _takes(peer, x, run)]
    for peer in able:
        peer.warm(x)
    timed = run.time(case.format, able, [peer.step(x) for peer in able])
    measured = [
        results.Measured(
            peer.name,
            peer.isa,
            case.format.symmetric or peer.name == OURS_SYMMETRIC,
            peer.weight_bytes,
            samples,
            limits,
        )
        for peer, (samples, limits) in zip(able, timed, strict=True)
    ]
    run.rows += results.rows_of(case, measured)


def _takes(peer: peers.Peer, x: torch.Tensor, run: rounds.Run) -> bool:
    """Whether the peer is timed on x."""
    if peer.most_rows is not None and len(x) > peer.most_rows:
        title = peer.weights.format.facts.title
        run.skip(f"{peer.label}: {title} beyond M={peer.most_rows}: a call takes up to seconds")
        return False
    return run.is_right(peer, lambda: guard.check(peer, x))


def _pack(case: Case, weights: Weights, llc_bytes: int, effort: timing.Effort) -> results.PackRow:
    # From disk tensors that rotate like the weights of a kernel: none of them is in a cache.
    sources = itertools.cycle(weights.copies(llc_bytes))
    samples = timing.time_in_turns({"pack": lambda: peers.pack(next(sources))}, effort)["pack"]
    packed = sum(tensor_bytes(t) for t in peers.pack(weights))
    disk = tensor_bytes(weights.codes)
    return results.pack_row(case, samples, disk, packed / weights.bytes)
