# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the CUDA tests that need no GPU."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The layers and the assertion of the CPU kernels' tests: both backends are held to one oracle.
sys.path.append(str(Path(__file__).resolve().parent.parent / "kernels"))

from sim_device import ASCENDING, Device, device

from vllm_plugin_tm.kernels import ops


@pytest.fixture
def sim(repository: Path) -> Iterator[Device]:
    """The CUDA backend on the simulator, blocks in ascending order."""
    library = device(repository)
    library.set_order(ASCENDING)
    yield library
    library.set_order(ASCENDING)


@pytest.fixture(scope="session")
def extension() -> None:
    """Loads the CPU's ops; skips where they are missing."""
    if not ops.is_available():
        pytest.skip("the compiled extension is not installed: the CPU's kernels are compared with")
