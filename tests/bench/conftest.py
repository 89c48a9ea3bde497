# SPDX-License-Identifier: Apache-2.0
"""Made-up reports and a small machine as fixtures, and the scripts of benchmarks/ on the path."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from bench_reports import mixed_report, moe_report, report

from vllm_plugin_tm.bench import limits, machine, timing

_SCRIPTS = str(Path(__file__).resolve().parents[2] / "benchmarks")
if _SCRIPTS not in sys.path:
    sys.path.insert(0, _SCRIPTS)


@pytest.fixture
def made_up():
    """A report of three cases in which ours is 6.4 times as fast as upstream."""
    return report()


@pytest.fixture
def mixed():
    """As made_up, with cases of 8-bit activations before its own."""
    return mixed_report()


@pytest.fixture
def routed():
    """A report of routed experts only."""
    return moe_report()


@pytest.fixture
def small_machine(monkeypatch):
    """A machine with a tiny cache and short limit loops; threads as they were afterwards."""
    threads = torch.get_num_threads()
    described = machine.describe
    monkeypatch.setattr(
        machine,
        "describe",
        lambda threads: dataclasses.replace(described(threads), llc_bytes=2**16),
    )
    monkeypatch.setattr(limits, "_EFFORT", timing.Effort(1e-5, 1e-4, (2, 2)))
    yield
    torch.set_num_threads(threads)
