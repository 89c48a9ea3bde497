# SPDX-License-Identifier: Apache-2.0
"""What all tests share: a clean set of our variables, the repository's root."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_plugin_tm import envs


@pytest.fixture(autouse=True)
def _no_variables_of_ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A shell that has the switch on must not change what a test sees."""
    for name in [name for name in os.environ if name.startswith(envs.PREFIX)]:
        monkeypatch.delenv(name)
    return


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return Path(__file__).resolve().parent.parent
