# SPDX-License-Identifier: Apache-2.0
"""Where the compiled extension is missing, tests collect, the kernels' skip and say why."""

import os
import subprocess
import sys
from pathlib import Path

# A pytest plugin for the child: the extension is not where it should be.
_HIDE = """
from vllm_plugin_tm.kernels import ops
ops.EXTENSION = "_C.hidden.so"
"""


def _pytest(tmp_path: Path, repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "hide_extension.py").write_text(_HIDE)
    command = [sys.executable, "-m", "pytest", "-p", "hide_extension", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, "--no-header", *arguments],
        cwd=repository,
        env=_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _environment(tmp_path: Path) -> dict[str, str]:
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def test_everything_collects(tmp_path: Path, repository: Path) -> None:
    """No module of the suite needs the extension to be imported."""
    run = _pytest(tmp_path, repository, "-q", "--collect-only", "tests")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "error" not in run.stdout.splitlines()[-1]


def test_kernel_tests_skip_with_the_reason(tmp_path: Path, repository: Path) -> None:
    """Nothing of tests/kernels fails or passes by accident, save what needs no extension."""
    names = ("test_reference", "test_reference_moe")
    pure = [f"--ignore=tests/kernels/{name}.py" for name in names]
    run = _pytest(tmp_path, repository, "-q", "-rs", "tests/kernels", *pure)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    last = run.stdout.splitlines()[-1]
    assert "skipped" in last, last
    assert "failed" not in last, last
    assert "error" not in last, last
    assert "passed" not in last, last
    assert "the compiled extension is not installed" in run.stdout


def test_the_package_says_what_is_missing(tmp_path: Path) -> None:
    """load() names the file and the cure, is_available() says no."""
    code = (
        "import hide_extension\n"
        "from vllm_plugin_tm.kernels import ops\n"
        "assert not ops.is_available()\n"
        "try:\n    ops.load()\n"
        "except ops.ExtensionMissingError as error:\n    print(error)\n"
    )
    (tmp_path / "hide_extension.py").write_text(_HIDE)
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "_C.hidden.so" in run.stdout
    assert "pip install" in run.stdout
