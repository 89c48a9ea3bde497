# SPDX-License-Identifier: Apache-2.0
"""A run on routed experts: prepare each layer, gate, time in turns beside the limits, collect."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from statistics import mean

from vllm_plugin_tm import heap
from vllm_plugin_tm.bench import moe_peers, moe_upstream, results, rounds
from vllm_plugin_tm.bench.cases import OURS, UPSTREAM, UPSTREAM_BF16
from vllm_plugin_tm.bench.moe_cases import MoeCase
from vllm_plugin_tm.bench.moe_weights import (
    MoeWeights,
    Routed,
    calls_of,
    checked_token,
    random_experts,
)
from vllm_plugin_tm.bench.peers import Rounding, our_rounding

KERNELS = (OURS, UPSTREAM, UPSTREAM_BF16)
"""Those that exist for routed experts."""

_Expected = dict[Rounding, moe_peers.Expected]


@dataclass(frozen=True, kw_only=True)
class Plan(rounds.Plan):
    """What to run."""

    cases: tuple[MoeCase, ...]


def run(plan: Plan, progress: rounds.Progress = lambda done, total, label: None) -> results.Report:
    """Measures the plan.

    Raises:
        ops.ExtensionMissingError: the limit loops and our kernel are in the extension.
        guard.WrongResultError: our kernel's result is wrong; a peer's is skipped and listed.
    """
    return rounds.report(plan, partial(_measure_all, plan, progress))


def _measure_all(plan: Plan, progress: rounds.Progress, run: rounds.Run) -> None:
    done = 0
    for _, same in groupby(plan.cases, key=lambda case: (case.layer, case.format)):
        cases = list(same)
        _measure_layer(cases, plan, progress, run, done)
        heap.trim()
        done += len(cases)
    progress(done, len(plan.cases), "limits again")


def _measure_layer(
    cases: list[MoeCase], plan: Plan, progress: rounds.Progress, run: rounds.Run, done: int
) -> None:
    """Cases of one layer and format. All of its weights are gone afterwards: two layers with their
    copies would not fit many a machine."""
    layer, form = cases[0].layer, cases[0].format
    label = f"{layer.model}, {form.name}"
    progress(done, len(plan.cases), label)
    weights = random_experts(layer, form)
    checked = checked_token(layer, form.dtype)
    # Before the kernels have their copies: the oracle takes gigabytes for a large expert.
    roundings = {our_rounding(form), Rounding.NONE}
    if UPSTREAM in plan.kernels and moe_upstream.may_run(form):
        roundings.add(Rounding.OWN)
    wanted = moe_peers.expected(weights, checked, roundings)
    everyone = list(run.available(_makers(plan, weights, run.llc_bytes)))
    # Four tokens for each expert at random: one in fifty stays without.
    many = replace(cases[0], m=4 * layer.experts // layer.top_k)
    for peer in everyone:
        peer.read_once(calls_of(many, checked)[0])
    for place, case in enumerate(cases, done):
        progress(place, len(plan.cases), f"{label}, T={case.m}")
        _measure(case, everyone, checked, wanted, run)


def _makers(plan: Plan, weights: MoeWeights, llc: int) -> Iterator[Callable[[], moe_peers.MoePeer]]:
    if OURS in plan.kernels:
        # One layout and so one set of copies for all instruction sets: a set is gigabytes.
        first = moe_peers.ours(weights, plan.isas[0], llc)
        yield from (partial(replace, first, isa=isa) for isa in plan.isas)
    if UPSTREAM in plan.kernels:
        yield partial(moe_upstream.upstream, weights, llc)
    if UPSTREAM_BF16 in plan.kernels:
        yield partial(moe_upstream.upstream_bf16, weights, llc)


def _measure(
    case: MoeCase,
    everyone: list[moe_peers.MoePeer],
    checked: Routed,
    wanted: _Expected,
    run: rounds.Run,
) -> None:
    calls = calls_of(case, checked)
    able = [
        peer
        for peer in everyone
        if run.is_right(peer, partial(moe_peers.check, peer, calls, wanted[peer.rounding]))
    ]
    timed = run.time(case.format, able, [peer.step(calls) for peer in able])
    touched = mean(call.experts for call in calls)
    measured = [
        results.Measured(
            peer.name,
            peer.isa,
            case.format.symmetric,
            round(touched * peer.expert_bytes),
            samples,
            limits,
        )
        for peer, (samples, limits) in zip(able, timed, strict=True)
    ]
    run.moe += results.moe_rows_of(case, measured, touched)
