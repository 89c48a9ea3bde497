# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the end-to-end tests: checkpoints under build/, child processes, two live servers."""

import contextlib
import fcntl
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: the end-to-end tests run it")

from tools import layout, make_model
from tools.process import die_with_parent, session_members, start, stop_group
from tools.server import Server, server_environment
from vllm_plugin_tm.kernels import ops

E2E = layout.BUILD / "e2e"
ENGINE_JOB = Path(__file__).with_name("engine_job.py")
TIMEOUT_SECONDS = 400


@pytest.fixture(scope="session", autouse=True)
def _extension() -> None:
    if not ops.is_available():
        pytest.skip("the compiled extension is not installed: these tests serve models with it")
    if not ops.cpu_isas():
        pytest.skip("this processor has none of AVX2, AVX-512: there is no kernel to serve with")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The references in this process are too small to share out, and the servers need the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def models() -> Path:
    """Where the tests' own checkpoints lie; made once, kept between runs."""
    (E2E / "models").mkdir(parents=True, exist_ok=True)
    return E2E / "models"


@pytest.fixture(scope="session")
def smollm2_w4a16(_extension: None) -> Path:
    """SmolLM2-135M in W4A16, group 32, the checkpoint of `make demo`."""
    plain = make_model.smollm2(layout.MODELS / make_model.PLAIN)
    return make_model.quantize_checkpoint(
        plain,
        layout.MODELS / make_model.w4a16_name(32, True),
        "w4a16",
        group_size=32,
        symmetric=True,
    )


@contextlib.contextmanager
def room_for(jobs: list[dict[str, Any]]) -> Iterator[None]:
    """Waits until these engines may run. Tests run side by side; workers that import vLLM on a core
    each would take both cores of another engine, and each would run into its time limit."""
    alone = any(job.get("spawn") for job in jobs)
    E2E.mkdir(parents=True, exist_ok=True)
    with (E2E / "cores.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


@dataclass(frozen=True)
class Ended:
    """A finished child: its exit status, all it printed, and processes that it left behind."""

    status: int
    output: str
    left: list[int]


class Child:
    """A process of ours and whatever it starts: the processes of its session."""

    def __init__(
        self, name: str, command: Sequence[str | Path], settings: Mapping[str, str]
    ) -> None:
        self.log = _log(name)
        environment = server_environment(settings)
        environment["PATH"] = f"{Path(sys.prefix) / 'bin'}:{environment.get('PATH', os.defpath)}"
        with self.log.open("wb") as output:
            self.process = start(command, env=environment, cwd=layout.BUILD, output=output)

    def wait(self, seconds: float = TIMEOUT_SECONDS) -> Ended:
        """Waits for the end; whatever is left after it, or then still runs, is ended here."""
        try:
            status = self.process.wait(timeout=seconds)
            left = left_of(self.process.pid)
        except subprocess.TimeoutExpired:
            status, left = -1, session_members(self.process.pid)
        finally:
            stop_group(self.process)
        return Ended(status, self.log.read_text(errors="replace"), left)


def left_of(session: int) -> list[int]:
    """What is left of a session whose leader has ended; helpers see its end a moment later."""
    deadline = time.monotonic() + 10
    while (left := session_members(session)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def _log(name: str) -> Path:
    path = E2E / "logs" / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


class Preloaded:
    """preloaded.py, and the processes that it becomes, one at a time."""

    def __init__(self) -> None:
        name = f"preloaded-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"
        with _log(name).open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, Path(__file__).with_name("preloaded.py")],
                env=server_environment({}),
                cwd=layout.BUILD,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                preexec_fn=die_with_parent,
            )

    def engine(self, name: str, jobs: list[dict[str, Any]], settings: Mapping[str, str]) -> Ended:
        """Runs engine_job.py with the plugin on; the results are in results_of(name)."""
        spec, environment = _job(name, jobs, settings)
        with room_for(jobs):
            return self._run(name, ENGINE_JOB, [spec, results_of(name)], environment)

    def _run(
        self, name: str, program: Path, arguments: Sequence[Path], settings: Mapping[str, str]
    ) -> Ended:
        """As Child(name, ...).wait() of `python PROGRAM ARGUMENTS`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        log = _log(name)
        request = {
            "program": str(program),
            "arguments": list(map(str, arguments)),
            "environment": dict(settings),
            "output": str(log),
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        timer = threading.Timer(TIMEOUT_SECONDS, os.killpg, (pid, signal.SIGKILL))
        timer.start()
        try:
            status = int(self._process.stdout.readline())
        finally:
            timer.cancel()
            left = left_of(pid)
            for process in left:
                os.kill(process, signal.SIGKILL)
        return Ended(status, log.read_text(errors="replace"), left)

    def close(self) -> None:
        """Ends the process; there is none that it became."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def results_of(name: str) -> Path:
    """Where engine_job.py leaves what it found."""
    return E2E / f"{name}.pt"


def _job(
    name: str, jobs: list[dict[str, Any]], settings: Mapping[str, str]
) -> tuple[Path, dict[str, str]]:
    """The jobs as a file, and the environment for them: one process for engine and model, so that
    parameters can be looked at."""
    results_of(name).unlink(missing_ok=True)
    spec = results_of(name).with_suffix(".json")
    spec.write_text(json.dumps(jobs))
    fixed = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    return spec, {"VLLM_PLUGIN_TM": "1", **fixed, **settings}


@pytest.fixture(scope="session")
def preloaded(_extension: None) -> Iterator[Preloaded]:
    """Runs programs with vLLM imported before."""
    process = Preloaded()
    yield process
    process.close()


def serve_command(model: Path, *arguments: str) -> list[str | Path]:
    """`vllm serve` of this environment."""
    return [Path(sys.prefix) / "bin" / "vllm", "serve", model, "--host", "127.0.0.1", *arguments]


@pytest.fixture(scope="session")
def run_engines(preloaded: Preloaded) -> Callable[..., list[dict[str, Any]]]:
    """Runs engine_job.py: run_engines(name, jobs, **environment) -> its results. An environment
    that decides what Python can import takes a new interpreter."""

    def run(name: str, jobs: list[dict[str, Any]], **settings: str) -> list[dict[str, Any]]:
        if "PYTHONPATH" in settings:
            spec, environment = _job(name, jobs, settings)
            command = [sys.executable, ENGINE_JOB, spec, results_of(name)]
            with room_for(jobs):
                ended = Child(name, command, environment).wait()
        else:
            ended = preloaded.engine(name, jobs, settings)
        assert ended.status == 0, ended.output[-6000:]
        return torch.load(results_of(name), weights_only=False)

    return run


@pytest.fixture(scope="session")
def torchvision() -> dict[str, str]:
    """What children need in their environment to import torchvision, as vLLM's modules of some
    models do: the tests' own, or the environment's, whether it fits torch or not."""
    folders = [Path(__file__).parents[1] / "child_site"]
    if layout.TORCHVISION_FOLDER.is_dir():
        folders.append(layout.TORCHVISION_FOLDER)
    elif importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed: `make setup-test` puts one beside .venv")
    paths = [*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def _server(model: Path, name: str, switch: str, *more: str) -> Iterator[Server]:
    with Server(
        model,
        log=E2E / "logs" / f"{name}.log",
        venv=Path(sys.prefix),
        settings={"VLLM_PLUGIN_TM": switch, "VLLM_CPU_KVCACHE_SPACE": "1"},
        arguments=("--max-model-len", "512", "--max-num-seqs", "8", "--dtype", "bfloat16", *more),
    ) as server:
        yield server


@pytest.fixture(scope="session")
def server_on(smollm2_w4a16: Path) -> Iterator[Server]:
    """`VLLM_PLUGIN_TM=1 vllm serve` of SmolLM2, as a user starts it: compiled."""
    yield from _server(smollm2_w4a16, "serve-on", "1")


@pytest.fixture(scope="module")
def server_off(smollm2_w4a16: Path) -> Iterator[Server]:
    """The same with the switch off: upstream's kernel. What upstream compiles without us is not
    ours to test, and takes most of the time that a server needs to start."""
    yield from _server(smollm2_w4a16, "serve-off", "0", "--enforce-eager")
