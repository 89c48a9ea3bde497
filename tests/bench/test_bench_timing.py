# SPDX-License-Identifier: Apache-2.0
"""timing.py with a made-up clock: turns, repeats, statistics. Nothing here looks at real time."""

import pytest

from vllm_plugin_tm.bench.timing import Effort, Samples, ratio, time_in_turns


class Clock:
    """Advances only when a step says how long it took."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def step(self, name, seconds):
        def run():
            self.calls.append(name)
            self.now += seconds

        return run


def test_steps_take_turns_and_short_ones_repeat():
    clock, switched = Clock(), []
    steps = {"long": clock.step("long", 1.5), "short": clock.step("short", 0.25)}
    effort = Effort(sample_s=1.0, case_s=0.0, rounds=(2, 9))
    samples = time_in_turns(steps, effort, switched.append, clock)
    warm_up = ["long"] * 2 + ["short"] * 2
    untimed = ["short"]
    one_round = ["long"] + untimed + ["short"] * 4
    assert clock.calls == warm_up + one_round * 2
    assert switched == ["long", "short"] * 3
    assert samples["long"].seconds == (1.5, 1.5)
    assert samples["short"].seconds == (0.25, 0.25)


def test_the_first_call_after_another_step_is_not_timed():
    clock, others = Clock(), []

    def step():
        clock.now += 0.25 if others else 3.0
        others.append(None)

    def switch(name):
        others.clear()

    effort = Effort(sample_s=1.0, case_s=0.0, rounds=(2, 9))
    assert time_in_turns({"a": step}, effort, switch, clock)["a"].seconds == (0.25, 0.25)


@pytest.mark.parametrize(("case_s", "rounds"), [(0.0, 2), (3.5, 3), (100.0, 9)])
def test_rounds_follow_the_time_there_is(case_s, rounds):
    clock = Clock()
    effort = Effort(sample_s=1.0, case_s=case_s, rounds=(2, 9))
    samples = time_in_turns({"a": clock.step("a", 1.0)}, effort, clock=clock)
    assert len(samples["a"].seconds) == rounds


def test_a_step_that_takes_no_time_is_survived():
    samples = time_in_turns({"a": lambda: None}, Effort(1.0, 1.0, (2, 3)), clock=lambda: 0.0)
    assert samples["a"].seconds == (0.0, 0.0, 0.0)


def test_statistics():
    samples = Samples((3.0, 1.0, 2.0, 5.0, 4.0))
    assert samples.median == 3.0
    assert samples.quantile(0.0) == 1.0
    assert samples.quantile(1.0) == 5.0
    assert samples.quantile(0.1) == pytest.approx(1.4)
    assert Samples((7.0,)).quantile(0.9) == 7.0


def test_ratio_is_of_neighbours_not_of_medians():
    own, other = Samples((1.0, 10.0, 1.0)), Samples((2.0, 30.0, 4.0))
    assert ratio(other, own) == 3.0
