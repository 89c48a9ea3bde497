# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for upstream's own suite: loads vLLM's plugins first, and says what took effect.

Upstream's unit tests build layers without an engine, so nothing would call our entry point and
both arms would run the same code. It is loaded with `-p arm_plugin` in both arms; the JUnit file
carries the property "patches": "applied", or "none" where vllm_plugin_tm left upstream alone.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

APPLY = "vllm_plugin_tm.patch.apply"
# A fixture of upstream's downloads this model into a folder for temporary files, unless it is
# there: the one thing that the hub's client cannot do from its cache alone.
OUT_OF_TREE = ("dummy_opt", "facebook/opt-125m", "MyOPTForCausalLM")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Before collection: module level code and parameters already see the patched upstream."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    _provide_out_of_tree_model(*OUT_OF_TREE)


@pytest.fixture(scope="session", autouse=True)
def report_patches(record_testsuite_property) -> None:
    """Puts the state of the patch table, read back from upstream, into the JUnit file."""
    record_testsuite_property("patches", _state())


def _provide_out_of_tree_model(name: str, model: str, architecture: str) -> None:
    """Copies a model of the local hub cache, under an architecture that a test plugin registers."""
    from huggingface_hub import snapshot_download

    folder = Path(tempfile.gettempdir(), name)
    if folder.exists():
        return
    shutil.copytree(snapshot_download(model, local_files_only=True), folder)
    config = folder / "config.json"
    content = json.loads(config.read_text()) | {"architectures": [architecture]}
    config.write_text(json.dumps(content))


def _state() -> str:
    apply = sys.modules.get(APPLY)
    if apply is None:
        return "none"
    missing = [row.target for row in apply.status() if not row.applied]
    return f"missing: {', '.join(missing)}" if missing else "applied"
