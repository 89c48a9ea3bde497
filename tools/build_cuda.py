# SPDX-License-Identifier: Apache-2.0
"""`make cuda`: the CUDA kernels for every supported GPU as build/cuda/libturbo_cuda.so. Needs nvcc,
and neither a GPU nor torch."""

import argparse
import os
import shutil
import subprocess

from tools import layout
from tools.console import ToolError, run_main, say, step

OLDEST_CMAKE = "3.22"


def main() -> int:
    """`python3 -m tools.build_cuda [--architectures "80-real;90a-real"]`"""
    parser = argparse.ArgumentParser(prog="tools.build_cuda", description=__doc__)
    parser.add_argument(
        "--architectures", default="", help="as CMake names them (default: all supported)"
    )
    args = parser.parse_args()
    cmake = _cmake()
    compiler = os.environ.get("CUDACXX") or "nvcc"
    if shutil.which(compiler) is None:
        raise ToolError(
            f"the CUDA compiler {compiler!r} was not found; install the CUDA toolkit 12.4 or newer "
            "and put its bin folder into PATH, or set CUDACXX"
        )
    folder = layout.BUILD / "cuda"
    configure = [cmake, "-S", str(layout.ROOT / "csrc" / "cuda"), "-B", str(folder)]
    if args.architectures:
        configure.append(f"-DCMAKE_CUDA_ARCHITECTURES={args.architectures}")
    with step("configuring the CUDA kernels"):
        _run(configure)
    with step("compiling the CUDA kernels"):
        _run([cmake, "--build", str(folder), "--parallel", str(os.cpu_count() or 1)])
    say(f"{folder / 'libturbo_cuda.so'}")
    return 0


def _cmake() -> str:
    """CMake of the environment, else of PATH. Raises ToolError with the cure."""
    own = layout.VENV / "bin" / "cmake"
    found = str(own) if own.is_file() else shutil.which("cmake")
    if found is None:
        raise ToolError(
            f"cmake {OLDEST_CMAKE} or newer was not found; pip install cmake, or make setup"
        )
    return found


def _run(command: list[str]) -> None:
    if subprocess.run(command, check=False).returncode:
        raise ToolError(f"{command[0]} failed; its messages are above")


if __name__ == "__main__":
    run_main(main)
