# SPDX-License-Identifier: Apache-2.0
"""The made-up report as a fixture, and the scripts of benchmarks/ on the path."""

import sys
from pathlib import Path

import pytest
from bench_reports import mixed_report, report

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
