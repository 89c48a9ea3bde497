# SPDX-License-Identifier: Apache-2.0
"""No child process outlives the tool that started it, however that ends."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools import process
from tools.console import ToolError

# A leader that ignores SIGTERM, with a child in the same group that does too.
STUBBORN = (
    "import os, signal, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "os.fork()\n"
    "open({ready!r}, 'a').write('x')\n"
    "time.sleep(60)\n"
)


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def test_a_failing_command_shows_the_end_of_its_log_and_the_cure(tmp_path):
    log = tmp_path / "logs" / "x.log"
    code = "print('first'); print('the reason'); raise SystemExit(3)"
    with pytest.raises(ToolError) as error:
        process.run([sys.executable, "-c", code], what="making x", cure="Do y.", log=log)
    text = str(error.value)
    assert text.startswith(f"making x failed (exit status 3); the end of {log}:\n")
    assert "the reason\nDo y." in text


def test_a_full_disk_in_a_log_is_pointed_out(tmp_path):
    code = "raise OSError(28, 'No space left on device')"
    with pytest.raises(ToolError, match="The disk is full: free some space"):
        process.run([sys.executable, "-c", code], what="x", log=tmp_path / "log")


def test_a_missing_program_is_named(tmp_path):
    with pytest.raises(ToolError, match=r"cannot start .*no-such-program"):
        process.run([tmp_path / "no-such-program"], what="x")


def test_the_whole_group_is_stopped_even_when_it_ignores_sigterm(tmp_path):
    ready = tmp_path / "ready"
    child = process.start([sys.executable, "-c", STUBBORN.format(ready=str(ready))])
    wait_for(lambda: ready.exists() and len(ready.read_text()) == 2)
    assert len(process.group_members(child.pid)) == 2
    process.stop_group(child, grace=0.3)
    assert process.group_members(child.pid) == []
    assert child.poll() == -signal.SIGKILL


def test_children_that_outlive_the_leader_are_stopped(tmp_path):
    ready = tmp_path / "ready"
    code = f"import os, time\nif os.fork() == 0:\n open({str(ready)!r}, 'w')\n time.sleep(60)\n"
    child = process.start([sys.executable, "-c", code])
    wait_for(lambda: ready.exists() and child.poll() is not None)
    assert process.group_members(child.pid)
    process.stop_group(child, grace=2)
    assert process.group_members(child.pid) == []


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    started = []
    real_start = process.start

    def remember(*args, **kwargs):
        started.append(real_start(*args, **kwargs))
        return started[0]

    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "start", remember)
    monkeypatch.setattr(process, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        process.run([sys.executable, "-c", "import time; time.sleep(60)"], what="x")
    assert process.group_members(started[0].pid) == []


def test_a_killed_tool_takes_its_child_along(tmp_path):
    """SIGKILL runs no `finally`: the kernel must end the child."""
    root = Path(process.__file__).parents[1]
    code = (
        "import sys, time\nfrom tools.process import start\n"
        "print(start([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    tool = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE)
    child = int(tool.stdout.readline())
    tool.kill()
    tool.communicate()
    wait_for(lambda: not process.group_members(child))


def test_tail_of_a_long_log_and_of_none(tmp_path):
    log = tmp_path / "log"
    assert process.tail(log) == ""
    log.write_text("".join(f"line {i}\n" for i in range(100_000)))
    assert process.tail(log, 2) == "line 99998\nline 99999"


def test_stopping_what_has_ended_is_no_error():
    child = process.start(["true"])
    child.wait()
    process.stop_group(child)
