# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the CUDA tests, which need no GPU; with --gpu the kernels run on one."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The layers and the assertion of the CPU kernels' tests: both backends are held to one oracle.
# And the small models of the patches' tests.
sys.path += [str(Path(__file__).resolve().parent.parent / part) for part in ("kernels", "patch")]

from cuda_device import Device
from gpu_device import gpu
from sim_device import ASCENDING, Simulator, simulator

from vllm_plugin_tm.kernels import ops


def pytest_addoption(parser: pytest.Parser) -> None:
    """Known where this folder is named on the command line."""
    parser.addoption("--gpu", action="store_true", help="run the kernels on a GPU")


@pytest.fixture
def simulated(request: pytest.FixtureRequest, repository: Path) -> Iterator[Simulator]:
    """The backend on the simulator, blocks in ascending order; not with --gpu."""
    if request.config.getoption("--gpu", default=False):
        pytest.skip("about the simulator: run without --gpu")
    library = simulator(repository)
    library.set_order(ASCENDING)
    yield library
    library.set_order(ASCENDING)


@pytest.fixture
def sim(request: pytest.FixtureRequest, repository: Path) -> Device:
    """The backend on the simulator or, with --gpu, on a GPU."""
    if request.config.getoption("--gpu", default=False):
        return gpu(repository)
    simulated: Simulator = request.getfixturevalue("simulated")
    return simulated


@pytest.fixture(scope="session")
def extension() -> None:
    """Loads the CPU's ops; skips where they are missing."""
    if not ops.is_available():
        pytest.skip("the compiled extension is not installed: the CPU's kernels are compared with")
