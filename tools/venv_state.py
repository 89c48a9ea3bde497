# SPDX-License-Identifier: Apache-2.0
"""What set-up has finished in .venv, kept in one file there, and whether that is still true."""

import csv
import json
import os
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tools.layout import VENV

FILE = "tm-setup.json"


@dataclass
class State:
    """`interpreter`, `version`: what .venv was made from. `vllm`: "installed" or "brought along".

    `steps` maps a finished step to the hash of what it depended on. `incomplete` names the
    distributions that lacked files when everything had been installed: nothing to repair.
    """

    interpreter: str = ""
    version: str = ""
    vllm: str = ""
    steps: dict[str, str] = field(default_factory=dict)
    incomplete: list[str] = field(default_factory=list)

    def save(self, venv: Path = VENV) -> None:
        """Writes the file in one piece: a reader sees the old one or the new one."""
        temporary = venv / f"{FILE}.new"
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(temporary, venv / FILE)


def load(venv: Path = VENV) -> State:
    """What was saved; an empty state where the file is missing or broken."""
    try:
        return State(**json.loads((venv / FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return State()


def python_of(venv: Path = VENV) -> Path:
    """The environment's interpreter."""
    return venv / "bin" / "python"


def runs(venv: Path = VENV) -> bool:
    """True where the environment's interpreter starts, is at its place, and has pip."""
    code = "import sys, pip; print(sys.prefix)"
    try:
        answer = subprocess.run(
            [python_of(venv), "-c", code], capture_output=True, text=True, cwd="/", timeout=120
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    # A moved tree leaves an environment whose scripts name the old place.
    return answer.returncode == 0 and Path(answer.stdout.strip()).resolve() == venv.resolve()


def site_packages(venv: Path = VENV) -> Path:
    """The folder that pip installs into."""
    found = sorted(venv.glob("lib/python3*/site-packages"))
    return found[-1] if found else venv / "lib" / "site-packages"


def distributions(venv: Path = VENV) -> dict[str, Path]:
    """Name, as in the folder's name -> .dist-info folder of each distribution."""
    infos = sorted(site_packages(venv).glob("*.dist-info"))
    return {info.name.removesuffix(".dist-info").rpartition("-")[0]: info for info in infos}


def incomplete(venv: Path = VENV) -> list[str]:
    """The distributions that lack a file they came with, or the list of those files.

    Takes half a second for the 43,000 files of vLLM and what it depends on.
    """
    site = site_packages(venv)
    infos = distributions(venv)
    return [name for name, info in infos.items() if not _all_there(site, info / "RECORD")]


def _all_there(site: Path, record: Path) -> bool:
    if not record.is_file():
        return False
    with record.open(newline="") as file:
        paths = (row[0] for row in csv.reader(file) if row)
        # Byte code may be written and removed at any time.
        return all(os.path.exists(site / path) for path in paths if not path.endswith(".pyc"))
