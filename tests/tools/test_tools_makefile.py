# SPDX-License-Identifier: Apache-2.0
"""The Makefile and .ci/run: every target is there, is thin, and typos are told."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = (
    *(
        "demo",
        "demo-online",
        "serve",
        "test",
        "test-fast",
        "lint",
        "wheel",
        "upstream-test",
        "compat",
        "bench",
    ),
    *("cuda", "clean", "help"),
)


def make(*arguments, **environment):
    return subprocess.run(
        ["make", "-C", ROOT, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "MAKEFLAGS": "", "MAKELEVEL": "0", **environment},
        timeout=60,
    )


def test_help_names_every_target():
    text = make("help").stdout
    for target in TARGETS:
        assert re.search(rf"^  make {target} ", text, re.MULTILINE), target


def test_make_alone_only_helps():
    assert make().stdout.splitlines()[-1] == make("help").stdout.splitlines()[-1]


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_a_recipe(target):
    answer = make("--dry-run", target)
    assert answer.returncode == 0, answer.stderr


def test_a_misspelled_target_is_an_error():
    answer = make("dmeo")
    assert answer.returncode != 0
    assert "dmeo" in answer.stderr


def test_a_python_that_does_not_exist_is_an_error():
    answer = make("setup", "PYTHON=/no/such/python")
    assert answer.returncode != 0
    assert "/no/such/python" in answer.stderr


def test_a_wrong_port_is_refused_before_anything_is_set_up():
    answer = make("serve", f"PYTHON={sys.executable}", "PORT=80a")
    assert answer.returncode != 0
    assert "error: PORT is '80a'" in answer.stderr


def test_every_tool_of_the_makefile_exists():
    text = (ROOT / "Makefile").read_text()
    for name in re.findall(r"\$\(TOOL\)\.(\w+)|-[mp] tools\.(\w+)", text):
        assert (ROOT / "tools" / f"{''.join(name)}.py").is_file(), name
    for path in re.findall(r"tools/\w+\.py", text):
        assert (ROOT / path).is_file(), path


def test_ci_calls_make_test_and_nothing_else():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [
        line
        for line in script.read_text().splitlines()
        if line and not line.startswith(("#", "set ", "cd "))
    ]
    assert commands == ["exec make test </dev/null"]


def test_fast_tests_come_first_and_those_of_minutes_before_other_slow_ones():
    from tools import fast_first

    class Item:
        def __init__(self, path, slow):
            self.path, self.slow = Path("tests") / path, slow

        def get_closest_marker(self, marker):
            return "yes" if marker == "slow" and self.slow else None

    paths = {
        "kernels/test_moe.py": True,
        "test_envs.py": False,
        "e2e/test_serve.py": True,
        "test_types.py": True,
        "kernels/test_values.py": True,
        "tools/test_tools_makefile.py": False,
        "csrc/test_sanitizers.py": True,
    }
    items = [Item(path, slow) for path, slow in paths.items()]
    fast_first.pytest_collection_modifyitems(items)
    assert [item.path.relative_to("tests").as_posix() for item in items] == [
        "test_envs.py",
        "tools/test_tools_makefile.py",
        "e2e/test_serve.py",
        "test_types.py",
        "csrc/test_sanitizers.py",
        "kernels/test_moe.py",
        "kernels/test_values.py",
    ]


def test_sigterm_to_make_reaches_the_tool(tmp_path):
    """Without `exec` in the recipe the shell would die and leave the tool running."""
    started, ended = tmp_path / "started", tmp_path / "ended"
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nimport signal, sys, time\n"
        f"def end(*_):\n open({str(ended)!r}, 'w')\n sys.exit(1)\n"
        f"signal.signal(signal.SIGTERM, end)\nopen({str(started)!r}, 'w')\ntime.sleep(60)\n"
    )
    python.chmod(0o755)
    running = subprocess.Popen(
        ["make", "-C", ROOT, "demo", f"PYTHON={python}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(started)
    running.send_signal(signal.SIGTERM)
    running.wait(timeout=30)
    wait_for(ended)


def wait_for(path, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.05)


def test_what_make_starts_needs_the_standard_library_alone(repository):
    """Before set-up there is no environment: the system's Python runs these."""
    names = sorted(set(re.findall(r"\$\(TOOL\)\.(\w+)", (repository / "Makefile").read_text())))
    assert {"demo", "serve", "setup_env"} <= set(names)
    lines = "\n".join(f"import tools.{name}" for name in names)
    run = subprocess.run(
        [sys.executable, "-S", "-c", lines], cwd=repository, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
