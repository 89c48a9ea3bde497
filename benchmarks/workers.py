# SPDX-License-Identifier: Apache-2.0
"""Engines that are measured in turns: each in processes of its own, loaded once, and stopped while
another one works, so that all are timed within seconds of each other and none disturbs.

A worker answers on its first standard output with a line of JSON for each line of JSON it is asked.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

ASK_PREFILL, ASK_DECODE = "prefill", "decode"


class WorkerError(RuntimeError):
    """A worker ended, or is not the engine it should be; the message says what its log has."""


@dataclass(frozen=True)
class Engine:
    """How to start a worker: its command, and what to change in the environment (None: unset).

    Its log must contain `log_has` and none of `log_lacks` once it has loaded: a measurement under
    the wrong name is worse than none.
    """

    name: str
    command: list[str]
    environment: dict[str, str | None]
    log_has: str = ""
    log_lacks: tuple[str, ...] = ()


class Worker:
    """A running engine; use it as a context manager, so that it never outlives the script."""

    def __init__(self, engine: Engine, log: Path) -> None:
        self.engine = engine
        self._log = log
        # Unbuffered: the log is read while the worker is stopped.
        environment = dict(os.environ) | {"PYTHONUNBUFFERED": "1"}
        for name, value in engine.environment.items():
            environment.pop(name, None)
            if value is not None:
                environment[name] = value
        start = time.monotonic()
        with log.open("w") as out:
            self._process = subprocess.Popen(
                engine.command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                text=True,
                start_new_session=True,  # so that signals reach its children too
            )
        try:
            self._read()  # the line that says it has loaded
            self._check_log()
        except BaseException:
            self.close()
            raise
        self.load_s = time.monotonic() - start
        self._signal(signal.SIGSTOP)

    def ask(self, what: str, tokens: int) -> float:
        """Tokens per second for ASK_PREFILL of a prompt of, or ASK_DECODE of, `tokens` tokens."""
        self._signal(signal.SIGCONT)
        try:
            self._write({"what": what, "tokens": tokens})
            return float(self._read()["tokens_per_s"])
        finally:
            self._signal(signal.SIGSTOP)

    def peak_bytes(self) -> int:
        """The most memory that one of the worker's processes, the one with the model, ever held."""
        peaks = [0]
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                if entry.name.isdigit() and os.getpgid(int(entry.name)) == self._process.pid:
                    fields = dict(
                        line.split(":", 1) for line in (entry / "status").read_text().splitlines()
                    )
                    peaks.append(int(fields["VmHWM"].split()[0]) * 1024)
        return max(peaks)

    def close(self) -> None:
        """Ends the worker and all its children."""
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)
        # The signal after this one cannot be ignored.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=20)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return  # it has ended: whoever asks it next gets a WorkerError

    def _check_log(self) -> None:
        log, engine = self._log.read_text(errors="replace"), self.engine
        if engine.log_has not in log:
            raise WorkerError(f"{engine.name}: {self._log} does not mention {engine.log_has}")
        for text in engine.log_lacks:
            if text in log:
                raise WorkerError(f"{engine.name}: {self._log} mentions {text}, and must not")

    def _write(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
        raise WorkerError(f"{self.engine.name} ended; the last lines of {self._log}:\n{tail}")


def end_with_this_process() -> None:
    """Makes SIGTERM an exception, so that a script told to end closes its workers first."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def serve(load: Callable[[], Callable[[int, int], None]]) -> None:
    """A worker's main loop.

    Args:
        load: loads the model, and returns generate(prompt_tokens, new_tokens), which computes a
            prompt that no cache knows and then exactly so many tokens, alone in its batch.
    """
    answers = _own_standard_output()
    generate = load()
    generate(16, 4)
    _answer(answers, {"loaded": True})
    for line in sys.stdin:
        message = json.loads(line)
        rate = _MEASURES[message["what"]](generate, message["tokens"])
        _answer(answers, {"tokens_per_s": rate})


def _prefill(generate: Callable[[int, int], None], tokens: int) -> float:
    return tokens / _seconds(generate, tokens, 1)


def _decode(generate: Callable[[int, int], None], tokens: int) -> float:
    """The first new token comes out of the prompt's pass, so that it is measured and taken off."""
    first = _seconds(generate, 16, 1)
    return tokens / (_seconds(generate, 16, tokens + 1) - first)


_MEASURES = {ASK_PREFILL: _prefill, ASK_DECODE: _decode}


def _seconds(generate: Callable[[int, int], None], prompt: int, new: int) -> float:
    start = time.perf_counter()
    generate(prompt, new)
    return time.perf_counter() - start


def _own_standard_output() -> TextIO:
    """Standard output for answers only: whatever else is printed goes to the log."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _answer(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()
