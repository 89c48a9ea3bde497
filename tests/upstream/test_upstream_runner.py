# SPDX-License-Identifier: Apache-2.0
"""The upstream runner's own parts: the selection file, the environment of an arm, its verdicts."""

import subprocess
import sys

import pytest

upstream_test = pytest.importorskip("tools.upstream_test", reason="needs pypi-simple")
from tools.console import ToolError  # noqa: E402
from tools.upstream_report import Outcome, Run  # noqa: E402


def test_the_selection_file_is_complete_and_names_what_the_issue_asks_for():
    groups = upstream_test.read_selection()
    paths = {path for group in groups for path in group.tests}
    assert all(group.tests for group in groups)
    assert any(group.fast for group in groups)
    assert {
        "tests/kernels/moe/test_cpu_quant_fused_moe.py",
        "tests/kernels/test_onednn.py",
        "tests/quantization/test_compressed_tensors.py",
        "tests/quantization/test_cpu_wna16.py",
    } <= paths
    assert any(path.startswith("tests/plugins_tests") for path in paths)
    assert any("kernel_selection" in path for path in paths)


def test_a_test_without_a_reason_is_refused(tmp_path):
    path = tmp_path / "selection.toml"
    path.write_text('[group.a]\ntimeout_s = 1\n[[test]]\npath = "tests/x.py"\ngroup = "a"\n')
    with pytest.raises(ToolError, match="needs a why"):
        upstream_test.read_selection(path)


def test_the_arms_differ_in_the_switch_and_their_caches_only(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGIN_TM_ISA", "avx2")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    arms = {
        arm: upstream_test.environment(arm, tmp_path, [], tmp_path, tmp_path)
        for arm in upstream_test.ARMS
    }
    different = {key for key in arms["on"] if arms["on"][key] != arms["off"].get(key)}
    assert different == {"VLLM_PLUGIN_TM", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"}
    assert (arms["off"]["VLLM_PLUGIN_TM"], arms["on"]["VLLM_PLUGIN_TM"]) == ("0", "1")
    assert arms["on"]["VLLM_PLUGIN_TM_ISA"] == "avx2"
    assert "VLLM_LOGGING_LEVEL" not in arms["on"]


def verdict(monkeypatch, tmp_path, off, on):
    """compare_groups() with these runs in place of pytest."""
    monkeypatch.setattr(upstream_test, "run_group", lambda *_: {"off": off, "on": on})
    monkeypatch.setattr(upstream_test, "write_report", lambda *_: None)
    group = upstream_test.Group("g", ("tests/x.py",), 1)
    return upstream_test.compare_groups([group], sys.executable, tmp_path / "v" / "t", tmp_path)


def test_a_regression_fails_the_run(monkeypatch, tmp_path):
    off, on = Run({"a": Outcome("passed")}, "none"), Run({"a": Outcome("failed")}, "applied")
    with pytest.raises(ToolError, match="1 tests pass with the switch off"):
        verdict(monkeypatch, tmp_path, off, on)


def test_an_on_arm_without_patches_shows_nothing_and_fails_the_run(monkeypatch, tmp_path):
    passed = {"a": Outcome("passed")}
    assert verdict(monkeypatch, tmp_path, Run(passed, "none"), Run(passed, "applied")) == 0
    for off, on in (("none", "none"), ("applied", "applied"), ("none", "missing: x")):
        with pytest.raises(ToolError, match="nothing is shown"):
            verdict(monkeypatch, tmp_path, Run(passed, off), Run(passed, on))


def test_a_run_without_any_outcome_fails(monkeypatch, tmp_path):
    with pytest.raises(ToolError, match="nothing is shown"):
        verdict(monkeypatch, tmp_path, Run({}, "none"), Run({}, "unknown"))


def test_a_hanging_process_is_not_waited_for():
    # A shell's background jobs ignore SIGINT, and so would their children.
    code = (
        "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert upstream_test.wait_for([process], timeout_s=0.2)[0] < 5
    finally:
        process.kill()
        process.wait()


def test_an_interpreter_without_vllm_is_named(tmp_path):
    empty = tmp_path / "python"
    empty.write_text("#!/bin/sh\nexit 0\n")
    empty.chmod(0o755)
    with pytest.raises(ToolError, match="has no vLLM"):
        upstream_test.installed_version(str(empty))
