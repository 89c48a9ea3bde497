# SPDX-License-Identifier: Apache-2.0
"""Rules over the source files of the whole tree, and over what the built extension links."""

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_plugin_tm.kernels import ops

ROOT = Path(__file__).resolve().parent.parent
CODE = {".py", ".cpp", ".cu", ".h", ".sh"}
TEXT = CODE | {".md", ".toml", ".txt", ".json", ".yaml", ".yml", ""}
FOLDERS = ("vllm_plugin_tm", "csrc", "tests", "tools", "benchmarks", "examples", "docs", ".ci")


def _files(suffixes: set[str], *folders: str) -> Iterator[Path]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in suffixes and "__pycache__" not in path.parts:
                yield path


def _offences(pattern: str, files: Iterator[Path]) -> list[str]:
    expression = re.compile(pattern)
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if expression.search(line)
    ]


def test_only_envs_reads_the_environment() -> None:
    offences = _offences(r"\bos\.environ|\bgetenv\b|\benviron\[", _files(CODE, "vllm_plugin_tm"))
    assert [o for o in offences if not o.startswith("vllm_plugin_tm/envs.py:")] == []
    assert _offences(r"\bgetenv\b", _files(CODE, "csrc")) == []


def test_kernel_sources_know_no_torch() -> None:
    include = r"#\s*include\s*[<\"](torch|ATen|c10|Python)"
    assert _offences(include, _files(CODE, "csrc/cpu", "csrc/cuda")) == []


def test_kernels_name_no_disk_format() -> None:
    """The oracles are the exception: they start from a checkpoint's tensors, so that they share
    nothing with the packing they judge."""
    formats = r"(?i)compressed.tensors|pack.quantized|gptq|awq|safetensors|gguf"
    files = (
        path for path in _files(CODE, "vllm_plugin_tm/kernels") if "reference" not in path.stem
    )
    assert _offences(formats, files) == []


def test_quantization_does_no_forward_math() -> None:
    """No product of matrices in any spelling; the only op that computes is one of ours."""
    products = {"matmul", "mm", "bmm", "addmm", "linear", "einsum", "mv", "dot", "baddbmm"}
    for path in _files({".py"}, "vllm_plugin_tm/quantization"):
        for node in ast.walk(ast.parse(path.read_text())):
            place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            assert not isinstance(node, ast.MatMult), place
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in products, place


def test_no_device_is_named_in_kernels() -> None:
    """Outputs are made where inputs are."""
    device = r"device\s*=\s*[\"'](cpu|cuda)|\.cuda\(|\.cpu\(\)|torch\.device\("
    assert _offences(device, _files(CODE, "vllm_plugin_tm/kernels")) == []


def test_files_are_short() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in _files(CODE, *FOLDERS)
        if (lines := path.read_text().count("\n")) > 600
    }
    assert long == {}


def test_every_source_file_names_its_licence() -> None:
    # Both comment characters; a script's first line may be its interpreter.
    unnamed = [
        str(path.relative_to(ROOT))
        for path in _files(CODE, *FOLDERS)
        if path.read_text().strip()
        and "SPDX-License-Identifier: Apache-2.0" not in "".join(path.read_text()[:200])
    ]
    assert unnamed == []


def test_no_place_of_a_developer_is_in_the_tree() -> None:
    """Paths of one machine and hosts of one package index: users have their own."""
    # Written so that this file does not contain them.
    words = ("/wo" + "rk/", "/ro" + "ot/", "/tmp" + "/w/", "/ho" + "me/", "pythonhos" + "ted")
    words += ("pypi" + ".org", "debian" + ".org", "npm" + "js")
    pattern = "|".join(re.escape(word) for word in words)
    offences = _offences(rf"(?<![\w.])(?:{pattern})", _files(TEXT, *FOLDERS))
    for name in ("README.md", "CMakeLists.txt", "pyproject.toml", "Makefile"):
        if (ROOT / name).exists():
            offences += _offences(rf"(?<![\w.])(?:{pattern})", iter([ROOT / name]))
    assert offences == []


def test_nothing_is_left_for_later() -> None:
    words = "|".join(("TO" + "DO", "FIX" + "ME", "X" + "XX", "HA" + "CK"))
    assert _offences(rf"\b({words})\b", _files(CODE, *FOLDERS)) == []


def _dynamic(*arguments: str) -> str:
    if not ops.is_available():
        pytest.skip("the compiled extension is not installed")
    tool = shutil.which("readelf")
    if tool is None:
        pytest.skip("readelf, which comes with the compiler, is not installed")
    command = [tool, "--wide", *arguments, str(ops.extension_path())]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_no_second_thread_pool_is_linked() -> None:
    """Threads come from torch: no OpenMP runtime of the extension's own, by name or by symbol."""
    needed = re.findall(r"NEEDED.*\[(.*)\]", _dynamic("-d"))
    assert needed, "a shared library needs some other"
    assert [name for name in needed if re.search(r"gomp|iomp|libomp|tbb|mkl", name)] == []
    symbols = _dynamic("--dyn-syms")
    assert re.findall(r"\b(?:GOMP_|__kmpc_|omp_)\w+", symbols) == []


def test_the_extension_links_no_python_and_no_place() -> None:
    """abi3 by having no Python in it; and no directory of the machine that built it."""
    dynamic = _dynamic("-d")
    assert "libpython" not in dynamic
    assert not re.search(r"RPATH|RUNPATH", dynamic), dynamic
