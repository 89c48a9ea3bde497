# SPDX-License-Identifier: Apache-2.0
"""Builds the C++ tests with the sanitizers, from the flags in CMakeLists.txt, and runs them.

The kernels for AMX run on the simulator, on every processor; their vectors are AVX-512 where the
processor has it, else AVX2.
"""

import concurrent.futures
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

# Endings of translation units; avx512vbmi is not one that a user can choose, see csrc/cpu/isa.h.
ISAS = ("avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "avx512vbmi", "amx")
SANITIZERS = {"memory": "address,undefined", "threads": "thread"}


def _cmake_flags(repository: Path) -> dict[str, list[str]]:
    """Compiler flags by instruction set, "" for the rest: read from where the build has them."""
    text = (repository / "CMakeLists.txt").read_text()
    values: dict[str, list[str]] = {}
    for name, rest in re.findall(r"^set\((TM_FLAGS\w*) ([^)]*)\)", text, flags=re.MULTILINE):
        words = []
        for word in rest.split():
            reference = re.fullmatch(r"\$\{(\w+)\}", word)
            words += values[reference[1]] if reference else [word]
        values[name] = words
    common = values["TM_FLAGS"]
    return {"": common} | {isa: common + values[f"TM_FLAGS_{isa}"] for isa in ISAS}


def _processor_flags() -> set[str]:
    """Instruction sets of this processor by the compiler's names for them."""
    (line, *_) = re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return set(line.replace("_", "").split())


def _can_run(flags: list[str], has: set[str]) -> bool:
    """Whether a processor that has `has` runs what is compiled with these flags."""
    return all(flag[2:] in has for flag in flags if flag.startswith("-m"))


def _build(repository: Path, kind: str) -> Path:
    """The test program with one kind of sanitizer. Objects are kept under build/ by the hash of
    everything that goes into them."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler: g++ 11 or newer builds these tests")
    cpu, tests = repository / "csrc" / "cpu", repository / "tests" / "csrc"
    sanitize = [f"-fsanitize={SANITIZERS[kind]}", "-fno-sanitize-recover=all"]
    # -O0: with -O1 one file of kernels takes 4 minutes. -g1 has the lines that a report names.
    # GCC's AVX-512 headers trip -Wuninitialized wherever they are inlined by a sanitizer.
    common = ["-std=c++20", "-O0", "-g1", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    common.append("-DTM_AMX_SIMULATOR")
    flags = _cmake_flags(repository)
    has = _processor_flags()
    if not _can_run(flags["amx"], has):
        flags["amx"] = flags["avx2"]
    headers = b"".join(
        path.read_bytes() for folder in (cpu, tests) for path in sorted(folder.glob("*.h"))
    )

    def compiled(source: Path) -> Path:
        isa = next((name for name in ISAS if source.stem.endswith(f"_{name}")), "")
        command = [compiler, *flags[isa], *common, f"-I{cpu}", "-c", str(source)]
        # What this processor cannot run is needed to link, and never called.
        if _can_run(flags[isa], has):
            command += sanitize
        mark = hashlib.sha256(repr(command).encode() + source.read_bytes() + headers).hexdigest()
        out = repository / "build" / "csrc_tests" / kind / f"{source.stem}-{mark[:16]}.o"
        if not out.exists():
            out.parent.mkdir(parents=True, exist_ok=True)
            for stale in out.parent.glob(f"{source.stem}-*.o"):
                if len(stale.stem) == len(out.stem):
                    stale.unlink()
            partial = out.with_suffix(".partial")
            subprocess.run([*command, "-o", str(partial)], check=True)
            partial.rename(out)
        return out

    sources = [*sorted(cpu.glob("*.cpp")), *sorted(tests.glob("*.cpp"))]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    program = objects[0].parent / "gemm_test"
    subprocess.run([compiler, *sanitize, *map(str, objects), "-o", str(program)], check=True)
    return program


@pytest.mark.slow
@pytest.mark.parametrize("kind", SANITIZERS)
def test_under_sanitizers(repository: Path, kind: str) -> None:
    """Address and undefined behaviour with all shapes; data races with what runs on threads."""
    program = _build(repository, kind)
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    run = subprocess.run(
        [str(program), *(["threads"] if kind == "threads" else [])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-6000:]
    if run.stdout.startswith("skipped"):
        pytest.skip(run.stdout.strip())
    assert " 0 failures" in run.stdout
