# SPDX-License-Identifier: Apache-2.0
"""How things are timed: in turns, so that what the machine does meanwhile hits all alike."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

Step = Callable[[], object]
"""One call of what is timed; each call may take the next of a rotating set."""


@dataclass(frozen=True)
class Samples:
    """Seconds per call, one entry per round; entry i of all peers comes from the same round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.seconds)

    def quantile(self, q: float) -> float:
        """The q-quantile, 0 <= q <= 1, between samples by straight line."""
        ordered = sorted(self.seconds)
        position = q * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def ratio(other: Samples, own: Samples) -> float:
    """How many times faster `own` is: the median over rounds of other's time over own's."""
    return median(b / a for a, b in zip(own.seconds, other.seconds, strict=True))


@dataclass(frozen=True)
class Effort:
    """How long a case may take.

    `sample_s`: a sample repeats a call until it lasts about this long, so that the clock does not
    show; `case_s`: seconds for all rounds of a case; `rounds`: at least
    and at most so many, whatever they take.
    """

    sample_s: float
    case_s: float
    rounds: tuple[int, int]


FULL = Effort(sample_s=0.008, case_s=0.75, rounds=(5, 31))
QUICK = Effort(sample_s=0.006, case_s=0.6, rounds=(5, 25))


def time_in_turns(
    steps: dict[str, Step],
    effort: Effort,
    before: Callable[[str], None] = lambda name: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Samples]:
    """Times all `steps` in rounds A B C A B C ..., after warming each up.

    The calls of a sample and the number of rounds follow from the first, unrecorded round.
    `before(name)` runs, untimed, ahead of every sample of that step. So does a call that is not
    longer than a sample: in service a kernel follows itself, layer after layer, and this one finds
    threads and caches as another kernel left them.
    """
    calls: dict[str, int] = {}
    short: set[str] = set()
    round_s = 0.0
    for name, step in steps.items():
        before(name)
        step()  # first touch: page faults, code paths, thread start
        one = _timed(step, 1, clock)
        calls[name] = max(1, round(effort.sample_s / one)) if one > 0 else 1
        if one <= effort.sample_s:
            short.add(name)
        round_s += max(one * calls[name], 1e-9)
    low, high = effort.rounds
    rounds = min(high, max(low, int(effort.case_s / round_s)))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            before(name)
            if name in short:
                step()
            seconds[name].append(_timed(step, calls[name], clock) / calls[name])
    return {name: Samples(tuple(values)) for name, values in seconds.items()}


def _timed(step: Step, calls: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(calls):
        step()
    return clock() - start
