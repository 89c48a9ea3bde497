# SPDX-License-Identifier: Apache-2.0
"""The kernels as nvcc compiles them, where it is installed: no warnings, no spills, the tensor-core
instructions that are meant. Needs no GPU."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ARCHITECTURE = "sm_80"  # the oldest, and so the one with the fewest instructions
DTYPES = ("f16", "bf16")


def _tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, or the copy that Triton's package carries."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        found = str(path) if path.is_file() else None
    return found


@pytest.fixture(scope="module", params=DTYPES)
def compiled(
    request: pytest.FixtureRequest,
    repository: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path, str]:
    """The dtype, the object of its kernels, and what the assembler says of them."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed: the CUDA toolkit has it")
    made = tmp_path_factory.mktemp("nvcc") / f"w4a16_{request.param}.o"
    target = f"arch=compute_{ARCHITECTURE[3:]},code={ARCHITECTURE}"
    flags = ["-std=c++17", "-O3", "-gencode", target, "-Xptxas", "-v"]
    flags += ["-Xcompiler", "-Wall,-Wextra,-Werror", "--Werror", "all-warnings"]
    source = repository / "csrc" / "cuda" / f"w4a16_{request.param}.cu"
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
    _, _, said = compiled
    kernels = re.findall(r"Compiling entry function '(\w+)'", said)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", said)
    assert len(kernels) == len(frames) == 10
    spilled = [(k, f) for k, f in zip(kernels, frames, strict=True) if f != ("0", "0", "0")]
    assert spilled == []


@pytest.mark.slow
def test_kernels_use_tensor_cores_and_asynchronous_copies(
    compiled: tuple[str, Path, str],
) -> None:
    dtype, made, _ = compiled
    cuobjdump = _tool("cuobjdump")
    if cuobjdump is None:
        pytest.skip("cuobjdump is not installed: the CUDA toolkit and Triton's package have it")
    dump = subprocess.run(
        [cuobjdump, "--dump-sass", str(made)], capture_output=True, text=True, check=True
    ).stdout
    kernels = dump.split("Function : ")[1:]
    assert len(kernels) == 10
    product = "HMMA.16816.F32.BF16" if dtype == "bf16" else "HMMA.16816.F32 "
    copies = r"LDGSTS\.E\S*\.BYPASS\S*\.128"
    for text in kernels:
        name = text.splitlines()[0]
        assert product in text, name
        assert re.search(copies, text), name
        assert "LDSM.16.M88.4" in text, name
        assert "LOP3.LUT" in text, name
        assert "HFMA2" in text, name
        for local in ("LDL", "STL"):
            assert not re.search(rf"\b{local}\b", text), f"{local} in {name}"
