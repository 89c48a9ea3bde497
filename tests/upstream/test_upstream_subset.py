# SPDX-License-Identifier: Apache-2.0
"""The quick part of vLLM's own suite, switch off and on: nothing that passes off fails on."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("pypi_simple", reason="reading a package index needs pypi-simple")
LEAST_PASSED = 100  # about 180 pass: far fewer means that they were not run


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_upstreams_selection_tests_pass_with_the_switch_on(repository):
    ops = pytest.importorskip("vllm_plugin_tm.kernels.ops", reason="needs torch")
    try:
        ops.load()
    except ops.ExtensionMissingError as error:
        pytest.skip(f"the compiled extension is missing: {error}")
    from tools.upstream_test import CACHE, OFFLINE

    found = subprocess.run(
        [sys.executable, "-m", "tools.upstream_test", "--fast"],
        cwd=repository,
        capture_output=True,
        text=True,
    )
    if found.returncode == OFFLINE and not os.environ.get("CI"):
        pytest.skip(found.stdout.strip().splitlines()[-1])
    assert found.returncode == 0, found.stdout + found.stderr
    report = json.loads((CACHE / "report-fast.json").read_text())
    assert report["regressions"] == {}
    assert report["counts"]["on"]["passed"] >= LEAST_PASSED
