# SPDX-License-Identifier: Apache-2.0
"""The kernels as nvcc compiles them, where it is installed: no warnings, no spills, the tensor-core
instructions that are meant. Needs no GPU."""

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ARCHITECTURE = "sm_80"  # the oldest, and so the one with the fewest instructions


@dataclass(frozen=True)
class Source:
    """What nvcc should make of a file: how many kernels, each with these instructions."""

    kernels: int
    instructions: tuple[str, ...]


PRODUCT = (r"LDGSTS\.E\S*\.BYPASS\S*\.128", r"LDSM\.16\.M88\.4")
DEQUANTIZES = (r"LOP3\.LUT", "HFMA2")
SOURCES = {
    "experts_f16": Source(10, (r"HMMA\.16816\.F32 ", *PRODUCT, *DEQUANTIZES)),
    "w4a16_bf16": Source(10, (r"HMMA\.16816\.F32\.BF16", *PRODUCT, *DEQUANTIZES)),
    "experts_w8a8": Source(5, (r"IMMA\.16832\.S8\.S8 ", *PRODUCT)),
    "w4a8": Source(15, (r"IMMA\.16832\.S8\.S8 ", *PRODUCT, r"LOP3\.LUT")),
    "w8a8": Source(5, (r"IMMA\.16832\.S8\.S8 ", *PRODUCT)),
    "moe": Source(4, ("EXIT",)),  # routing, the quantizer of h, and the sum over experts
    "linear": Source(1, (r"LDG\.E\.128", r"STG\.E\.128", r"SHFL\.BFLY")),  # the quantizer
}


def _tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, or the copy that Triton's package carries."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        found = str(path) if path.is_file() else None
    return found


@pytest.fixture(scope="module", params=SOURCES)
def compiled(
    request: pytest.FixtureRequest,
    repository: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path, str]:
    """The file's name, the object of its kernels, and what the assembler says of them."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed: the CUDA toolkit has it")
    made = tmp_path_factory.mktemp("nvcc") / f"{request.param}.o"
    target = f"arch=compute_{ARCHITECTURE[3:]},code={ARCHITECTURE}"
    flags = ["-std=c++17", "-O3", "-gencode", target, "-Xptxas", "-v"]
    flags += ["-Xcompiler", "-Wall,-Wextra,-Werror", "--Werror", "all-warnings"]
    source = repository / "csrc" / "cuda" / f"{request.param}.cu"
    run = subprocess.run(
        [nvcc, *flags, "-c", str(source), "-o", str(made)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    return request.param, made, run.stdout + run.stderr


@pytest.mark.slow
def test_kernels_stay_in_registers(compiled: tuple[str, Path, str]) -> None:
    """Every tile, with small groups and large; a spill, or an array with a run-time index, would
    show as bytes of the stack."""
    name, _, said = compiled
    kernels = re.findall(r"Compiling entry function '(\w+)'", said)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", said)
    assert len(kernels) == len(frames) == SOURCES[name].kernels
    spilled = [(k, f) for k, f in zip(kernels, frames, strict=True) if f != ("0", "0", "0")]
    assert spilled == []


@pytest.mark.slow
def test_kernels_use_the_instructions_that_are_meant(
    compiled: tuple[str, Path, str],
) -> None:
    source, made, _ = compiled
    cuobjdump = _tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("cuobjdump is not installed: the CUDA toolkit and Triton's package have it")
    dump = subprocess.run(
        [cuobjdump, "--dump-sass", str(made)], capture_output=True, text=True, check=True
    ).stdout
    kernels = dump.split("Function : ")[1:]
    assert len(kernels) == SOURCES[source].kernels
    for text in kernels:
        name = text.splitlines()[0]
        for instruction in SOURCES[source].instructions:
            assert re.search(instruction, text), f"no {instruction} in {name}"
        for local in ("LDL", "STL"):
            assert not re.search(rf"\b{local}\b", text), f"{local} in {name}"


@pytest.mark.slow
@pytest.mark.parametrize("source", ["cuda_linear", "cuda_moe", "cuda_pack"])
def test_bindings_compile(repository: Path, source: str) -> None:
    """Against this torch's headers, which need no CUDA; nothing is built."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed: the CUDA toolkit has it")
    headers = Path(torch.__file__).parent / "include"
    flags = [
        "-std=c++20",
        "-x",
        "c++",
        "-isystem",
        str(headers),
        "-DTORCH_TARGET_VERSION=0x020d000000000000ULL",
    ]
    flags += ["-Xcompiler", "-Wall,-Wextra,-Werror,-fsyntax-only", "-o", os.devnull]
    path = repository / "csrc" / "torch" / f"{source}.cpp"
    run = subprocess.run(
        [nvcc, *flags, "-c", str(path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
