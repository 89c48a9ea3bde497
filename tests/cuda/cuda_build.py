# SPDX-License-Identifier: Apache-2.0
"""Builds programs and libraries of csrc/cuda with the host's C++ compiler, once for each state of
the sources: objects and results are kept under build/ by the hash of what goes into them."""

import concurrent.futures
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from filelock import FileLock

# -O1 builds in half the time of -O2, and the simulator takes most of the time anyway.
FLAGS = ("-std=c++20", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror")


def build(
    repository: Path,
    name: str,
    sources: Sequence[Path],
    link: Sequence[str],
    folders: Sequence[str],
) -> Path:
    """The program or library `name` of `sources`, linked with the flags `link`; headers of
    `folders`, relative to the repository, are part of every object's hash."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler: g++ 11 or newer builds these tests")
    headers = b"".join(
        path.read_bytes()
        for folder in folders
        for path in sorted((repository / folder).rglob("*.h"))
    )
    out = repository / "build" / "cuda_tests"
    out.mkdir(parents=True, exist_ok=True)
    include = [f"-I{repository / folder}" for folder in folders]

    def compiled(source: Path) -> Path:
        command = [compiler, *FLAGS, *include, "-x", "c++", "-c", str(source)]
        mark = hashlib.sha256(repr(command).encode() + source.read_bytes() + headers).hexdigest()
        made = out / f"{name}-{source.stem}-{mark[:16]}.o"
        if not made.exists():
            for stale in out.glob(f"{name}-{source.stem}-*.o"):
                if len(stale.stem) == len(made.stem):
                    stale.unlink()
            partial = made.with_suffix(".partial")
            subprocess.run([*command, "-o", str(partial)], check=True)
            partial.rename(made)
        return made

    # Of tests side by side the first builds with all cores, the others wait for it.
    with FileLock(out / f"{name}.lock"):
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, sources))
        mark = hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:16]
        result = out / f"{name}-{mark}{'.so' if '-shared' in link else ''}"
        if not result.exists():
            for stale in out.glob(f"{name}-????????????????*"):
                if len(stale.name) == len(result.name):
                    stale.unlink()
            partial = out / f"{name}-{mark}.partial"
            subprocess.run([compiler, *link, *map(str, objects), "-o", str(partial)], check=True)
            partial.rename(result)
    return result
