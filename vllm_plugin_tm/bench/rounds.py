# SPDX-License-Identifier: Apache-2.0
"""What every run does around its cases: limits before, beside and after them, kernels in turns,
refusals noted. Knows no op and no weights."""

import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from vllm_plugin_tm.bench import amx, figures, guard, machine, peers, results, timing
from vllm_plugin_tm.bench.cases import Format
from vllm_plugin_tm.bench.limits import LimitLoops, dot_kind, with_loads
from vllm_plugin_tm.kernels import ops

_READ, _DOT = "limit: read", "limit: {}"

Progress = Callable[[int, int, str], None]
"""Called with cases done, cases in all, and what comes next."""
K = TypeVar("K", bound=peers.Kernel)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to run. `isas` are for our kernel, best first; `command` goes into the report."""

    kernels: tuple[str, ...]
    isas: tuple[str, ...]
    threads: int
    effort: timing.Effort
    command: str


@dataclass
class Run:
    """A run under way: its limit loops, and what it found so far."""

    plan: Plan
    llc_bytes: int
    loops: LimitLoops
    rates: Mapping[str, float]  # of dots, before the run
    rows: list[figures.Row] = field(default_factory=list)
    moe: list[figures.MoeRow] = field(default_factory=list)
    packing: list[results.PackRow] = field(default_factory=list)
    skipped: dict[str, None] = field(default_factory=dict)  # ordered, each reason once

    def skip(self, reason: object) -> None:
        """Notes what is not measured, and why."""
        self.skipped[str(reason)] = None

    def available(self, makers: Iterable[Callable[[], K]]) -> Iterator[K]:
        """The kernels that can be made here."""
        for make in makers:
            try:
                yield make()
            except peers.UnavailableError as reason:
                self.skip(reason)

    def is_right(self, kernel: peers.Kernel, check: Callable[[], object]) -> bool:
        """Whether a kernel passes the gate. Ours must; of a peer it is noted.

        Raises:
            guard.WrongResultError: ours is wrong.
        """
        try:
            check()
        except guard.WrongResultError as error:
            if kernel.isa:
                raise
            self.skip(error)
            return False
        return True

    def time(
        self, form: Format, kernels: Sequence[peers.Kernel], steps: Sequence[timing.Step]
    ) -> list[tuple[timing.Samples, figures.RowLimits]]:
        """The kernels' samples, and their limits in the same rounds; `steps[i]` is of kernel i."""
        able = {kernel.label: kernel for kernel in kernels}
        kinds = {
            label: dot_kind(form, self.rates, _may_use_tiles(kernel))
            for label, kernel in able.items()
        }
        turns = dict(zip(able, steps, strict=True))
        turns |= {_READ: self.loops.read}
        dots = {*kinds.values(), *filter(None, map(with_loads, kinds.values()))}
        turns |= {_DOT.format(kind): self.loops.dot(kind) for kind in dots}

        def before(label: str) -> None:
            if label in able:
                able[label].select()

        samples = timing.time_in_turns(turns, self.plan.effort, before)

        def rate(kind: str) -> float:
            return self.loops.dot_flops(kind) / samples[_DOT.format(kind)].median / 1e9

        def limits_of(kind: str) -> figures.RowLimits:
            read = self.loops.read_bytes / samples[_READ].median / 1e9
            loads = with_loads(kind)
            return figures.RowLimits(read, rate(kind), kind, rate(loads) if loads else None)

        return [(samples[label], limits_of(kind)) for label, kind in kinds.items()]


def _may_use_tiles(kernel: peers.Kernel) -> bool:
    """Ours where it runs on AMX, a peer where AMX is not hidden from it."""
    return kernel.isa == "amx" if kernel.isa else not amx.is_hidden()


def report(plan: Plan, measure: Callable[[Run], None]) -> results.Report:
    """Runs `measure` between two measurements of the limits; the instruction set in use is what it
    was afterwards.

    Raises:
        ops.ExtensionMissingError: the limit loops and our kernel are in the extension.
    """
    ops.load()
    torch.set_num_threads(plan.threads)
    here = machine.describe(plan.threads)
    loops = LimitLoops(here.llc_bytes)
    before = loops.measure()
    run = Run(plan, here.llc_bytes, loops, before.dot_gflops)
    isa = ops.get_isa()
    try:
        measure(run)
    finally:
        if isa in ops.cpu_isas():
            ops.set_isa(isa)
    return results.Report(
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        command=plan.command,
        machine=here,
        before=before,
        after=loops.measure(),
        rows=tuple(run.rows),
        packing=tuple(run.packing),
        skipped=tuple(run.skipped),
        moe=tuple(run.moe),
    )
