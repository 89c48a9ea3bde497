# SPDX-License-Identifier: Apache-2.0
"""Rules of the house that a reader would have to check else: who may import, print, read what."""

import ast
import re
from pathlib import Path

import pytest

import vllm_plugin_tm.envs

PACKAGE = Path(vllm_plugin_tm.envs.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))


def names(paths):
    return [path.relative_to(PACKAGE).as_posix() for path in paths]


def imports(path):
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_there_are_sources_to_check():
    assert len(SOURCES) > 15


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_every_file_has_its_licence_and_says_what_lives_there(path):
    text = path.read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_only_the_command_line_prints(path):
    if path.is_relative_to(PACKAGE / "cli"):
        return
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert "print" not in {getattr(call.func, "id", None) for call in calls}


def test_kernels_know_no_disk_format_and_no_vllm():
    for path in sorted((PACKAGE / "kernels").rglob("*.py")):
        for module in imports(path):
            assert not module.startswith(("vllm.", "vllm_plugin_tm.quantization", "safetensors"))
            assert module != "vllm"


def test_the_layers_below_do_not_know_the_ones_above():
    for path in sorted((PACKAGE / "quantization").rglob("*.py")):
        assert not any(m.startswith("vllm_plugin_tm.patch") for m in imports(path)), path


def test_patches_hold_no_arithmetic():
    arithmetic = (ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.LShift, ast.RShift, ast.MatMult)
    for path in sorted((PACKAGE / "patch").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.BinOp) and isinstance(node.op, arithmetic):
                # `"text" % x` and the like would show up too; there is none.
                pytest.fail(f"{path.name}:{node.lineno} computes")


def test_no_device_is_hard_coded_in_the_layers_way():
    """Tensors stay where the loader put them: no .cuda(), no .to("cpu")."""
    pattern = re.compile(r"\.cuda\(|\.cpu\(\)|\.to\(\s*[\"'](cpu|cuda)")
    for path in sorted((PACKAGE / "quantization").rglob("*.py")):
        assert not pattern.search(path.read_text()), path


def test_only_the_reference_takes_codes_apart():
    """One unpacker and one packer of checkpoints, which are the compressed-tensors library's; one
    packer of kernel layouts, which is C++. Only AWQ's experts come in an order that has to be
    undone before; only embeddings are looked up instead of multiplied; only the converter writes
    checkpoints."""
    users = {
        name
        for path, name in zip(SOURCES, names(SOURCES), strict=True)
        if re.search(r"unpack_from_int32|pack_to_int32", path.read_text())
    }
    assert "kernels/reference.py" in users
    layers = {name for name in users if name.startswith(("quantization/", "patch/"))}
    assert layers == {
        "quantization/auto_awq.py",
        "quantization/compressed_tensors/compressed_tensors_embedding.py",
        "quantization/convert/run.py",
    }
