# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the CUDA tests that need no GPU."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The layers and the assertion of the CPU kernels' tests: both backends are held to one oracle.
sys.path.append(str(Path(__file__).resolve().parent.parent / "kernels"))

from sim_device import ASCENDING, Device, device


@pytest.fixture
def sim(repository: Path) -> Iterator[Device]:
    """The CUDA backend on the simulator, blocks in ascending order."""
    library = device(repository)
    library.set_order(ASCENDING)
    yield library
    library.set_order(ASCENDING)
