# SPDX-License-Identifier: Apache-2.0
"""One run: prepare each matrix, gate, time in turns beside the limits, collect."""

import datetime
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

import torch

from vllm_plugin_tm.bench import guard, machine, peers, results, timing, upstream
from vllm_plugin_tm.bench.cases import OURS, OURS_SYMMETRIC, TORCH, UPSTREAM, UPSTREAM_W8A8, Case
from vllm_plugin_tm.bench.limits import LimitLoops, dot_kind
from vllm_plugin_tm.bench.weights import DTYPES, Weights, random_weights, tensor_bytes
from vllm_plugin_tm.kernels import ops

_READ, _DOT = "limit: read", "limit: dot"

Progress = Callable[[int, int, str], None]
"""Called with cases done, cases in all, and what comes next."""


@dataclass(frozen=True)
class Plan:
    """What to run. `isas` are for our kernel, best first; `command` goes into the report.

    `more` makes further peers from (weights, bytes of the last-level cache); it may raise
    peers.UnavailableError.
    """

    cases: tuple[Case, ...]
    kernels: tuple[str, ...]
    isas: tuple[str, ...]
    threads: int
    effort: timing.Effort
    command: str
    more: tuple[Callable[[Weights, int], peers.Peer], ...] = ()


@dataclass
class _Collected:
    rows: list[results.Row] = field(default_factory=list)
    packing: list[results.PackRow] = field(default_factory=list)
    skipped: dict[str, None] = field(default_factory=dict)  # ordered, each reason once


def run(plan: Plan, progress: Progress = lambda done, total, label: None) -> results.Report:
    """Measures the plan.

    Raises:
        ops.ExtensionMissingError: the limit loops and our kernel are in the extension.
        guard.WrongResultError: our kernel's result is wrong; a peer's is skipped and listed.
    """
    ops.load()
    torch.set_num_threads(plan.threads)
    here = machine.describe(plan.threads)
    loops = LimitLoops(here.llc_bytes)
    found = _Collected()
    before = loops.measure()
    isa = ops.get_isa()
    try:
        done = 0
        for cases in _by_matrix(plan.cases):
            first = cases[0]
            label = f"{first.n}x{first.k}, {first.format.name}"
            progress(done, len(plan.cases), label)
            weights = random_weights(first.n, first.k, first.format)
            if OURS in plan.kernels:
                found.packing.append(_pack(first, weights, here.llc_bytes, plan.effort))
            everyone = list(_peers(plan, weights, here.llc_bytes, found))
            for case in cases:
                progress(done, len(plan.cases), f"{label}, M={case.m}")
                _measure(case, everyone, loops, plan.effort, found)
                done += 1
    finally:
        if isa in ops.cpu_isas():
            ops.set_isa(isa)
    progress(done, len(plan.cases), "limits again")
    return results.Report(
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=plan.command,
        machine=here,
        before=before,
        after=loops.measure(),
        rows=tuple(found.rows),
        packing=tuple(found.packing),
        skipped=tuple(found.skipped),
    )


def _by_matrix(cases: tuple[Case, ...]) -> Iterator[list[Case]]:
    """Cases that share a weight matrix, which is made once for all of them."""
    for _, same in groupby(cases, key=lambda case: (case.n, case.k, case.format)):
        yield list(same)


def _peers(plan: Plan, weights: Weights, llc: int, found: _Collected) -> Iterator[peers.Peer]:
    if OURS in plan.kernels:
        for isa in plan.isas:
            yield peers.ours(weights, isa, llc)
        if not weights.format.symmetric:
            yield peers.ours(weights.symmetric(), plan.isas[0], llc, OURS_SYMMETRIC)
    beside = UPSTREAM_W8A8 in plan.kernels and weights.format.scheme == "w4a8"
    makers = [
        *([upstream.upstream] if UPSTREAM in plan.kernels else []),
        *([upstream.upstream_w8a8] if beside else []),
        *([peers.torch_linear] if TORCH in plan.kernels else []),
        *plan.more,
    ]
    for make in makers:
        try:
            yield make(weights, llc)
        except peers.UnavailableError as reason:
            found.skipped[str(reason)] = None


def _measure(
    case: Case,
    everyone: list[peers.Peer],
    loops: LimitLoops,
    effort: timing.Effort,
    found: _Collected,
) -> None:
    generator = torch.Generator().manual_seed(case.m)
    x = torch.randn(case.m, case.k, generator=generator).to(DTYPES[case.format.dtype])
    able = {peer.label: peer for peer in everyone if _takes(peer, x, found)}
    for peer in able.values():
        peer.warm(x)
    kind = dot_kind(case.format, loops.dot_flops)
    steps = {label: peer.step(x) for label, peer in able.items()}
    steps |= {_READ: loops.read, _DOT: loops.dot(kind)}

    def before(label: str) -> None:
        if label in able:
            able[label].select()

    samples = timing.time_in_turns(steps, effort, before)
    limits = results.RowLimits(
        read_gbps=loops.read_bytes / samples[_READ].median / 1e9,
        dot_gflops=loops.dot_flops(kind) / samples[_DOT].median / 1e9,
        dot_kind=kind,
    )
    measured = [
        results.Measured(
            peer.name,
            peer.isa,
            case.format.symmetric or peer.name == OURS_SYMMETRIC,
            peer.weight_bytes,
            samples[label],
        )
        for label, peer in able.items()
    ]
    found.rows += results.rows_of(case, measured, limits)


def _takes(peer: peers.Peer, x: torch.Tensor, found: _Collected) -> bool:
    """Whether the peer is timed on x. Ours must be right; of a peer it is noted and the peer left
    out."""
    if peer.most_rows is not None and len(x) > peer.most_rows:
        title = peer.weights.format.facts.title
        reason = f"{peer.label}: {title} beyond M={peer.most_rows}: a call takes up to seconds"
        found.skipped[reason] = None
        return False
    try:
        guard.check(peer, x)
    except guard.WrongResultError as error:
        if peer.isa:
            raise
        found.skipped[str(error)] = None
        return False
    return True


def _pack(case: Case, weights: Weights, llc_bytes: int, effort: timing.Effort) -> results.PackRow:
    # From disk tensors that rotate like the weights of a kernel: none of them is in a cache.
    sources = itertools.cycle(weights.copies(llc_bytes))
    samples = timing.time_in_turns({"pack": lambda: peers.pack(next(sources))}, effort)["pack"]
    packed = sum(tensor_bytes(t) for t in peers.pack(weights))
    disk = tensor_bytes(weights.codes)
    return results.pack_row(case, samples, disk, packed / weights.bytes)
