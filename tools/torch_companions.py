# SPDX-License-Identifier: Apache-2.0
"""Finds torchvision, torchaudio and torchcodec builds that do not fit the installed torch.

pip may pick builds for CUDA beside a CPU torch; vLLM then dies at import ("operator
torchvision::nms does not exist"), while text models need none of the three.
"""

import subprocess
from collections.abc import Sequence
from pathlib import Path

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
# Exit status of the probe where the module is not installed: nothing to complain of.
_ABSENT = 3
_PROBE = """
import importlib.util, sys
if importlib.util.find_spec(sys.argv[1]) is None:
    sys.exit(3)
import torch
__import__(sys.argv[1])
"""


def mismatched(python: Path, names: Sequence[str] = COMPANIONS) -> dict[str, str]:
    """Name -> last line of the error, for each module that is installed but cannot be imported.

    Each is imported in a process of its own: a wrong library may end the process.
    """
    found = {}
    for name in names:
        answer = subprocess.run(
            [python, "-c", _PROBE, name], capture_output=True, text=True, cwd="/"
        )
        if answer.returncode not in (0, _ABSENT):
            lines = answer.stderr.strip().splitlines()
            found[name] = lines[-1] if lines else f"exit status {answer.returncode}"
    return found
