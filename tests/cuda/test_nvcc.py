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

OLDEST, HOPPER = "sm_80", "sm_90a"  # the oldest has the fewest instructions


@dataclass(frozen=True)
class Source:
    """What nvcc should make of a file for an architecture: how many kernels, which of them these
    instructions are in (by a part of the name), and which."""

    name: str
    architecture: str
    kernels: int
    instructions: tuple[str, ...]
    of: str = ""

    def __str__(self) -> str:
        return f"{self.name}-{self.architecture}"


PRODUCT = (r"LDGSTS\.E\S*\.BYPASS\S*\.128", r"LDSM\.16\.M88\.4")
DEQUANTIZES = (r"LOP3\.LUT", "HFMA2")
# Products that no wait of the compiler's own keeps apart, bulk copies, phases, and cp.async for x.
WARPGROUPS = ("UBLKCP", r"SYNCS\.PHASECHK", r"ARRIVES\.LDGSTSBAR", PRODUCT[0])
MMA, WGMMA = "FamilyE0", "FamilyE1"
SOURCES = (
    Source("experts_f16", OLDEST, 22, (r"HMMA\.16816\.F32 ", *PRODUCT, *DEQUANTIZES), MMA),
    Source("w4a16_bf16", OLDEST, 22, (r"HMMA\.16816\.F32\.BF16", *PRODUCT, *DEQUANTIZES), MMA),
    Source("experts_w8a8", OLDEST, 11, (r"IMMA\.16832\.S8\.S8 ", *PRODUCT), MMA),
    Source("w4a8", OLDEST, 33, (r"IMMA\.16832\.S8\.S8 ", *PRODUCT, r"LOP3\.LUT"), MMA),
    Source("w8a8", OLDEST, 11, (r"IMMA\.16832\.S8\.S8 ", *PRODUCT), MMA),
    # Routing, the quantizer of h, and the sum over experts; the quantizer of x.
    Source("moe", OLDEST, 4, ("EXIT",)),
    Source("linear", OLDEST, 1, (r"LDG\.E\.128", r"STG\.E\.128", r"SHFL\.BFLY")),
    Source("w4a16_bf16", HOPPER, 22, (r"HGMMA\.64x\d+x16\.F32\.BF16", *WARPGROUPS), WGMMA),
    Source("experts_w8a8", HOPPER, 11, (r"IGMMA\.64x\d+x32\.S8\.S8 ", *WARPGROUPS), WGMMA),
    Source("w4a8", HOPPER, 33, (r"IGMMA\.64x\d+x32\.S8\.S8 ", *WARPGROUPS), WGMMA),
)


def _tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, or the copy that Triton's package carries."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        found = str(path) if path.is_file() else None
    return found


@pytest.fixture(scope="module", params=SOURCES, ids=str)
def compiled(
    request: pytest.FixtureRequest,
    repository: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Source, Path, str]:
    """A file, the object of its kernels, and what the assembler says of them."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed: the CUDA toolkit has it")
    source: Source = request.param
    made = tmp_path_factory.mktemp("nvcc") / f"{source}.o"
    target = f"arch=compute_{source.architecture[3:]},code={source.architecture}"
    flags = ["-std=c++17", "-O3", "-gencode", target, "-Xptxas", "-v"]
    flags += ["-Xcompiler", "-Wall,-Wextra,-Werror", "--Werror", "all-warnings"]
    path = repository / "csrc" / "cuda" / f"{source.name}.cu"
    run = subprocess.run(
        [nvcc, *flags, "-c", str(path), "-o", str(made)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    return source, made, run.stdout + run.stderr


@pytest.mark.slow
def test_kernels_stay_in_registers(compiled: tuple[Source, Path, str]) -> None:
    """Every tile, with small groups and large; a spill, or an array with a run-time index, would
    show as bytes of the stack. And products of warpgroups overlap with what is between them: where
    it cannot be sure of registers ptxas waits for each of them, and says so."""
    source, _, said = compiled
    kernels = re.findall(r"Compiling entry function '(\w+)'", said)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", said)
    assert len(kernels) == len(frames) == source.kernels
    spilled = [(k, f) for k, f in zip(kernels, frames, strict=True) if f != ("0", "0", "0")]
    assert spilled == []
    assert re.findall(r".*(?:serialized|is injected).*", said) == []


@pytest.mark.slow
def test_kernels_use_the_instructions_that_are_meant(
    compiled: tuple[Source, Path, str],
) -> None:
    source, made, _ = compiled
    cuobjdump = _tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("cuobjdump is not installed: the CUDA toolkit and Triton's package have it")
    dump = subprocess.run(
        [cuobjdump, "--dump-sass", str(made)], capture_output=True, text=True, check=True
    ).stdout
    kernels = dump.split("Function : ")[1:]
    assert len(kernels) == source.kernels
    meant = [text for text in kernels if source.of in text.splitlines()[0]]
    assert len(meant) > source.kernels // 3
    for text in meant:
        name = text.splitlines()[0]
        for instruction in source.instructions:
            assert re.search(instruction, text), f"no {instruction} in {name}"
    for text in kernels:
        for local in ("LDL", "STL"):
            assert not re.search(rf"\b{local}\b", text), f"{local} in {text.splitlines()[0]}"


@pytest.mark.slow
@pytest.mark.parametrize("source", ["cuda_linear", "cuda_moe", "cuda_pack", "cuda_tuning"])
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
