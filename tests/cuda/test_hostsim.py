# SPDX-License-Identifier: Apache-2.0
"""The simulator of csrc/cuda itself: instructions against plain arithmetic, and every fault that it
must report."""

import functools
import re
import subprocess
from pathlib import Path

import pytest
from cuda_build import build

SOURCES = ("sim_instructions.cpp", "sim_sm90.cpp", "sim_faults.cpp")
HERE = Path(__file__).parent
NAMES = re.findall(r"SIM_TEST\((\w+)\)", "".join((HERE / name).read_text() for name in SOURCES))


@functools.cache
def _program(repository: Path) -> Path:
    simulator = sorted((repository / "csrc" / "cuda" / "hostsim").glob("*.cpp"))
    sources = [*simulator, *(HERE / name for name in SOURCES)]
    return build(repository, "sim_test", sources, [], ("csrc/cuda", "tests/cuda"))


def test_all_are_run(repository: Path) -> None:
    listed = subprocess.run([_program(repository)], capture_output=True, text=True, check=True)
    assert sorted(listed.stdout.split()) == sorted(NAMES)
    assert len(NAMES) > 15


@pytest.mark.parametrize("name", NAMES)
def test_simulator(repository: Path, name: str) -> None:
    run = subprocess.run([_program(repository), name], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert f"{name}: 0 failures" in run.stdout
