# SPDX-License-Identifier: Apache-2.0
"""What all tests share: a clean set of our variables, an upstream without AMX, the repository's
root."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_plugin_tm import envs

_CHILD_SITE = Path(__file__).with_name("child_site")


def pytest_configure() -> None:
    """Hides AMX from torch, here and in children: child_site says why."""
    if "amx_tile" not in Path("/proc/cpuinfo").read_text().split():
        return
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(_CHILD_SITE) not in paths:  # workers of xdist have it from their parent
        os.environ["PYTHONPATH"] = os.pathsep.join([str(_CHILD_SITE), *filter(None, paths)])
    import torch
    from child_site import sitecustomize

    sitecustomize.hide_amx(torch.cpu)


def pytest_collection_finish() -> None:
    """Keeps what collection made out of later collections of garbage: vLLM asks for one at every
    load and every end of its groups, which took a second each among fifteen thousand tests."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Libraries that count what is left at the interpreter's end would call all of it leaked."""
    gc.unfreeze()


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
