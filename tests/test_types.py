# SPDX-License-Identifier: Apache-2.0
"""The types of the whole tree, as `make lint` checks them: here beside other tests, since it takes
a core for a minute and more where nothing is cached."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_types(repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mypy"], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
