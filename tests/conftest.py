# SPDX-License-Identifier: Apache-2.0
"""What all tests share: a clean set of our variables, a vLLM without AMX or a lesser processor, the
repository's root."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_plugin_tm import envs

_CHILD_SITE = Path(__file__).with_name("child_site")


def pytest_configure() -> None:
    """Hides from torch, here and in children, what child_site says."""
    sys.path.append(str(_CHILD_SITE))
    from child_site.sitecustomize import AfterImport, functions
    from lesser_processor import hide, named

    try:
        processor = named(os.environ)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    if processor is None and "amx_tile" not in Path("/proc/cpuinfo").read_text().split():
        return
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(_CHILD_SITE) in paths:  # workers of xdist have it from their parent
        return
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_CHILD_SITE), *filter(None, paths)])
    if processor is not None:
        hide(processor)
    AfterImport.install(functions(processor))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests whose expectations depend on the processor."""
    from lesser_processor import TESTS

    marked = {Path(__file__).parent / file for file in TESTS}
    for item in items:
        if item.path in marked:
            item.add_marker("processor")


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
