# SPDX-License-Identifier: Apache-2.0
"""Child processes in a process group of their own, so that nothing of ours outlives a failure."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from tools.console import Progress, ToolError

PR_SET_PDEATHSIG = 1  # linux/prctl.h
TAIL_BYTES = 65536  # of a log, enough for its last lines; it is read twice a second
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """In a child of ours: the kernel ends it when its parent is killed outright."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def start(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    output: IO[bytes] | int | None = None,
) -> subprocess.Popen[bytes]:
    """Starts `command` as the leader of a new session (and so of a new process group).

    Stdout and stderr go to `output` (None: this process's own). Raises ToolError naming the program
    that cannot be started.
    """
    try:
        return subprocess.Popen(
            [str(part) for part in command],
            env=dict(env) if env is not None else None,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output is not None else None,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    except FileNotFoundError as error:
        raise ToolError(f"cannot start {command[0]}: {error.strerror}") from error


def group_members(group: int) -> list[int]:
    """The living processes of a process group; zombies do not count."""
    return _members(group, 0)


def session_members(session: int) -> list[int]:
    """The living processes of a session; zombies do not count."""
    return _members(session, 1)


def _members(number: int, field: int) -> list[int]:
    """Processes with `number` in that field of /proc/PID/stat, counted from the process group."""
    members = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = Path("/proc", entry, "stat").read_text()
        except OSError:  # it ended meanwhile
            continue
        state, _parent, *numbers = stat.rpartition(")")[2].split()[:4]
        if int(numbers[field]) == number and state not in "ZX":
            members.append(int(entry))
    return members


def stop_group(process: subprocess.Popen[bytes], grace: float = 20.0) -> None:
    """Ends everything in the group that start() made: SIGTERM, `grace` seconds, then SIGKILL."""
    group = process.pid
    for signum, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 5.0)):
        # While a member lives, or the leader is not reaped, the number cannot be given to others.
        if process.poll() is not None and not group_members(group):
            return
        try:
            os.killpg(group, signum)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if process.poll() is not None and not group_members(group):
                return
            time.sleep(0.05)


def run(
    command: Sequence[str | Path],
    *,
    what: str,
    cure: str = "",
    log: Path | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> None:
    """Runs `command` to its end, with its output in `log` where given.

    Raises ToolError when it fails: `what` failed, the log's last lines, and `cure`. Whatever ends
    this call (Ctrl-C included), the command's process group is gone afterwards.
    """
    output: IO[bytes] | None = None
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.open("wb")
    try:
        process = start(command, env=env, cwd=cwd, output=output)
        try:
            status = _wait(process, log)
        finally:
            stop_group(process, grace=5.0)
    finally:
        if output is not None:
            output.close()
    if status != 0:
        raise ToolError(f"{what} failed (exit status {status}){_evidence(log)}{_sentence(cure)}")


def _wait(process: subprocess.Popen[bytes], log: Path | None) -> int:
    """The exit status; until then the newest line of the log is shown."""
    if log is None:
        return process.wait()
    progress = Progress()
    try:
        while True:
            try:
                return process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                progress.update(tail(log, 1).strip() or "running")
    finally:
        progress.close()


def tail(path: Path, lines: int = 25) -> str:
    """The last lines of a text file."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        text = file.read().decode(errors="replace")
    return "\n".join(text.splitlines()[-lines:])


def _evidence(log: Path | None) -> str:
    if log is None:
        return ""
    end = tail(log)
    full = "No space left on device" in end
    return f"; the end of {log}:\n{end}" + ("\nThe disk is full: free some space." if full else "")


def _sentence(cure: str) -> str:
    return f"\n{cure}" if cure else ""
