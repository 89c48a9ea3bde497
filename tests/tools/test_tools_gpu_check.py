# SPDX-License-Identifier: Apache-2.0
"""The check for machines with a GPU, as far as one without can tell."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import gpu_check
from tools.console import ToolError

REPORT = """<testsuites><testsuite>
<testcase classname="tests.cuda.test_a" name="one"/>
<testcase classname="tests.cuda.test_a" name="two"><failure message="no">text</failure></testcase>
<testcase classname="tests.cuda.test_a" name="three"><skipped message="why"/></testcase>
<testcase classname="tests.cuda.test_b" name="four"><error message="no">text</error></testcase>
<testcase classname="tests.cuda.test_b" name="five"/>
</testsuite></testsuites>"""


def test_a_report_is_counted() -> None:
    assert gpu_check.read_report(REPORT) == {
        "passed": 2,
        "skipped": 1,
        "failed": ["tests.cuda.test_a::two", "tests.cuda.test_b::four"],
    }


@pytest.mark.parametrize(
    ("tests", "sanitizer", "right"),
    [
        ({"passed": 5, "failed": []}, {}, True),
        ({"passed": 5, "failed": []}, {"memcheck": "clean"}, True),
        ({"passed": 5, "failed": []}, {"memcheck": "clean", "racecheck": ["1 hazard"]}, False),
        ({"passed": 5, "failed": ["a::b"]}, {}, False),
        ({"passed": 0, "failed": []}, {}, False),
    ],
)
def test_what_counts_as_passed(
    tests: dict[str, object], sanitizer: dict[str, object], right: bool
) -> None:
    assert gpu_check.passed({"tests": tests, "sanitizer": sanitizer}) is right


def test_results_are_named_by_gpu_and_date() -> None:
    path = gpu_check.result_path({"gpu": "NVIDIA H200 (141 GB)", "date": "2030-01-31"})
    assert path == gpu_check.RESULTS / "nvidia-h200-141-gb-2030-01-31.json"


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "MODULES", ("torch", "no_such_module"))
    with pytest.raises(ToolError, match="lacks no_such_module: pip install"):
        gpu_check.describe_machine()


def test_the_script_says_that_there_is_no_gpu(repository: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    run = subprocess.run(
        [repository / "scripts" / "gpu_check.sh"],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 1
    assert "sees no GPU; this check needs one" in run.stdout + run.stderr
