# SPDX-License-Identifier: Apache-2.0
"""Failures of the tools become one clear line and an exit status."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from tools import console
from tools.console import ToolError, run_main


def status_of(main):
    with pytest.raises(SystemExit) as exit_info:
        run_main(main)
    return exit_info.value.code


def raising(error):
    def main():
        raise error

    return main


@pytest.fixture(autouse=True)
def _signals_as_before():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_success_says_nothing(capsys):
    assert status_of(lambda: 0) == 0
    assert capsys.readouterr().err == ""


def test_a_tool_error_is_one_line_without_a_traceback(capsys):
    assert status_of(raising(ToolError("g++ is missing; install it"))) == 1
    assert capsys.readouterr().err == "error: g++ is missing; install it\n"


def test_ctrl_c_has_the_shells_status(capsys):
    assert status_of(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_file_and_the_cure(capsys, number):
    assert status_of(raising(OSError(number, os.strerror(number), "/some/file"))) == 1
    text = capsys.readouterr().err
    assert "no space left on the disk (/some/file): free some" in text


def test_other_system_errors_name_the_file(capsys):
    assert status_of(raising(PermissionError(errno.EACCES, "Permission denied", "/x"))) == 1
    assert capsys.readouterr().err == "error: Permission denied (/x)\n"


def test_sigterm_unwinds():
    """What a tool started is stopped in `finally` blocks: SIGTERM must reach them."""
    code = (
        "import os, signal, time\nfrom tools.console import run_main\n"
        "def main():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)\n"
        "    finally:\n"
        "        print('cleaned up', flush=True)\n"
        "run_main(main)\n"
    )
    root = console.__file__.rpartition("/tools/")[0]
    answer = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert answer.stdout == "cleaned up\n"
    assert answer.stderr == "error: ended by SIGTERM\n"
    assert answer.returncode == 128 + signal.SIGTERM


def test_progress_in_a_log_is_not_a_line_per_update(capsys):
    progress = console.Progress(every=1000)
    for _ in range(50):
        progress.update("still waiting")
    progress.close()
    assert capsys.readouterr().out.count("still waiting") == 1
