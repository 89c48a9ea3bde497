# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the kernel tests: the extension, one run per instruction set, torch's threads."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from vllm_plugin_tm import envs
from vllm_plugin_tm.kernels import ops

LEFT_OUT = pytest.StashKey[Counter[str]]()
"""How many tests were not collected, by the instruction set that this processor lacks."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what this processor cannot run: skipping thousands of tests one by one takes
    minutes. test_instruction_sets.py says how many there are."""
    left_out = config.stash.setdefault(LEFT_OUT, Counter())
    if not ops.is_available():
        return
    isas = ops.cpu_isas()
    kept: list[pytest.Item] = []
    left: list[pytest.Item] = []
    for item in items:
        call = getattr(item, "callspec", None)
        isa = call.params.get("isa") if call is not None else None
        lacking = isa in envs.ISAS and isa not in isas
        if lacking:
            left_out[isa] += 1
        (left if lacking else kept).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.fixture(scope="session")
def left_out(pytestconfig: pytest.Config) -> Counter[str]:
    """How many kernel tests this processor cannot run, by instruction set."""
    return pytestconfig.stash[LEFT_OUT]


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
