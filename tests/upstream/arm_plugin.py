# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for upstream's own suite: loads vLLM's plugins first, and says what took effect.

Upstream's unit tests build layers without an engine, so nothing would call our entry point and
both arms would run the same code. It is loaded with `-p arm_plugin` in both arms; the JUnit file
carries the property "patches": "applied", or "none" where vllm_plugin_tm left upstream alone.
"""

import sys

import pytest

APPLY = "vllm_plugin_tm.patch.apply"


def pytest_sessionstart(session: pytest.Session) -> None:
    """Before collection: module level code and parameters already see the patched upstream."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()


@pytest.fixture(scope="session", autouse=True)
def report_patches(record_testsuite_property) -> None:
    """Puts the state of the patch table, read back from upstream, into the JUnit file."""
    record_testsuite_property("patches", _state())


def _state() -> str:
    apply = sys.modules.get(APPLY)
    if apply is None:
        return "none"
    missing = [row.target for row in apply.status() if not row.applied]
    return f"missing: {', '.join(missing)}" if missing else "applied"
