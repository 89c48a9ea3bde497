# SPDX-License-Identifier: Apache-2.0
"""Starts `vllm serve` on a loopback port, waits until it answers, asks it, and always stops it."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tools import layout
from tools.console import Progress, ToolError
from tools.process import group_members, start, stop_group, tail

HOST = "127.0.0.1"
# Loading and compiling a small model takes about a minute on two cores; slow machines take longer.
START_SECONDS = 900.0
REQUEST_SECONDS = 300.0
# A proxy that the user configured is not for the loopback.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def free_port() -> int:
    """A loopback port that nobody listens on now. Another process may still take it first."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def check_port(port: int) -> None:
    """Raises ToolError where the port cannot be listened on."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
    except (OSError, OverflowError) as error:
        raise ToolError(f"port {port} of {HOST} cannot be used: {error}") from error


def server_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """This process's environment, offline, with every cache inside the tree, and `settings`."""
    cache = layout.CACHE
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cache / "huggingface"),
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "VLLM_CONFIG_ROOT": str(cache / "vllm-config"),
        "XDG_CACHE_HOME": str(cache),
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONUNBUFFERED": "1",
        **settings,
    }


class Server:
    """A context manager around one `vllm serve MODEL`; the server is gone when it is left.

    `venv` is the environment with vLLM; `settings` are environment variables for the server only;
    `arguments` follow the model; `log` receives all it prints; `port` None is a free one.
    Entering starts the process and waits for its health; `url` is its address without a slash.
    """

    def __init__(
        self,
        model: Path | str,
        *,
        log: Path,
        venv: Path = layout.VENV,
        settings: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        port: int | None = None,
    ) -> None:
        self.model = str(model)
        self.log = log
        self.port = port if port is not None else free_port()
        self.url = f"http://{HOST}:{self.port}"
        self._command: list[str | Path] = [
            venv / "bin" / "vllm",
            "serve",
            self.model,
            "--host",
            HOST,
        ]
        self._command += ["--port", str(self.port), *arguments]
        self._environment = server_environment(settings or {})
        # vLLM runs helpers (ninja among them) by name.
        self._environment["PATH"] = f"{venv / 'bin'}:{self._environment.get('PATH', os.defpath)}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Server":
        check_port(self.port)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        layout.BUILD.mkdir(exist_ok=True)
        with self.log.open("wb") as output:
            # Not in the tree: what is found there is not what is installed.
            self._process = start(
                self._command, env=self._environment, cwd=layout.BUILD, output=output
            )
        try:
            self.wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def processes(self) -> list[int]:
        """The server's living processes, its engine's among them."""
        return group_members(self._process.pid) if self._process is not None else []

    def stop(self) -> None:
        """Ends the server and every process it started; nothing happens the second time."""
        process, self._process = self._process, None
        if process is not None:
            stop_group(process)

    def wait_until_healthy(self, seconds: float = START_SECONDS) -> None:
        """Returns when /health answers. Raises ToolError when the server ends or time runs out."""
        deadline = time.monotonic() + seconds
        progress = Progress()
        try:
            while not self._is_healthy():
                self.check_alive()
                if time.monotonic() > deadline:
                    raise ToolError(f"the server did not answer in {seconds:.0f} s; {self._why()}")
                progress.update(f"waiting for the server: {_message(tail(self.log, 1))}")
                time.sleep(0.5)
        finally:
            progress.close()

    def check_alive(self) -> None:
        """Raises ToolError with the end of the log when the server's process has ended."""
        if self._process is None:
            raise ToolError("the server is not running")
        status = self._process.poll()
        if status is not None:
            raise ToolError(f"the server ended with exit status {status}; {self._why()}")

    def complete(self, prompt: str, **options: Any) -> dict[str, Any]:
        """POSTs a completion (temperature 0 unless given); returns the decoded answer."""
        body = {"model": self.model, "prompt": prompt, "temperature": 0, **options}
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with _opener.open(request, timeout=REQUEST_SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace")
            raise ToolError(f"the server refused ({error.code}): {reason}") from error
        except (OSError, ValueError) as error:
            self.check_alive()
            raise ToolError(f"the server at {self.url} did not answer: {error}") from error

    def _is_healthy(self) -> bool:
        try:
            with _opener.open(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def _why(self) -> str:
        """The lines of the log that say most: from the first error on, else its end."""
        lines = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if "ERROR" in line or "Error:" in line]
        shown = "\n".join(errors[-12:]) or tail(self.log)
        return f"{self.log} says:\n{shown}"


def _message(line: str) -> str:
    """A log line without its prefix of process, level, time and place."""
    return line.rpartition("] ")[2].strip() or "starting"
