# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the kernel tests: the extension, one run per instruction set, torch's threads."""

from collections.abc import Iterator

import pytest
import torch

from vllm_plugin_tm import envs
from vllm_plugin_tm.kernels import ops


@pytest.fixture(scope="session")
def extension() -> None:
    """Loads the ops; skips where they are missing."""
    if not ops.is_available():
        pytest.skip("the compiled extension is not installed: these tests run its kernels")


@pytest.fixture(params=envs.ISAS)
def isa(request: pytest.FixtureRequest, extension: None) -> Iterator[str]:
    """Runs the test on each instruction set that this processor has; restores the choice. A test
    may parametrize it with instruction sets of its own choice."""
    if request.param not in ops.cpu_isas():
        pytest.skip(f"this processor has no {request.param}")
    before = ops.get_isa()
    ops.set_isa(request.param)
    yield request.param
    ops.set_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's number of threads after a test that sets it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
