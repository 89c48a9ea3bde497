# SPDX-License-Identifier: Apache-2.0
"""The suite on lesser processors: what child_site/lesser_processor.py hides is hidden, and tests
whose expectations depend on the processor pass on AVX2 too."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from lesser_processor import PROCESSORS, TESTS, VARIABLE, Processor, here, named

from vllm_plugin_tm.kernels import ops

_REPOSITORY = Path(__file__).resolve().parent.parent

_BELIEVES = """
import torch
from torch.nn.functional import conv2d
from vllm.platforms import current_platform
from vllm_plugin_tm.bench import machine
from vllm_plugin_tm.kernels import ops
conv2d(torch.ones(2, 64, 64, 64), torch.ones(64, 64, 3, 3))
current_platform.import_kernels()
maps = open("/proc/self/maps").read()
libraries = {line.rpartition("/")[2] for line in maps.splitlines() if "/vllm/_C" in line}
print("library", *libraries)
print("torch", torch.backends.cpu.get_cpu_capability())
print("isas", *ops.cpu_isas(), "in use", ops.get_isa())
print("flags", *machine.describe(1).flags)
"""
_LIBRARIES = {"avx2": "_C_AVX2", "avx512": "_C_AVX512", "avx512bf16": "_C"}
"""vLLM's libraries, and the least processor of each."""
_ONEDNN = {
    "avx2": "Intel AVX2",
    "avx512": "Intel AVX-512 with AVX512BW, AVX512VL, and AVX512DQ extensions",
    "avx512bf16": "Intel AVX-512 with Intel DL Boost and bfloat16 support",
}


def _environment(name: str) -> dict[str, str]:
    """The environment of tests on a processor, as a user starts them."""
    left_out = ("PYTHONPATH", "PYTEST_", "COV_", "ATEN_CPU", "ONEDNN_MAX")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    return {**kept, VARIABLE: name, "PYTHONPATH": str(_REPOSITORY / "tests" / "child_site")}


@pytest.mark.parametrize("name", [name for name in here() if name in _LIBRARIES])
def test_a_process_believes_in_it(name: str) -> None:
    pytest.importorskip("vllm")
    if not ops.is_available():
        pytest.skip("extension not built")
    environment = {**_environment(name), "ONEDNN_VERBOSE": "1"}
    command = [sys.executable, "-c", _BELIEVES]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout
    processor = PROCESSORS[name]
    assert f"library {_LIBRARIES[name]}.abi3.so\n" in said
    assert f"torch {processor.settings['ATEN_CPU_CAPABILITY'].upper()}\n" in said
    assert f"isas {' '.join(processor.isas)} in use {processor.isas[0]}\n" in said
    assert f"isa:{_ONEDNN[name]}\n" in said
    (flags,) = [line.split()[1:] for line in said.splitlines() if line.startswith("flags")]
    assert not [flag for flag in flags if processor.hides(flag)]


def test_a_processor_hides_what_it_lacks() -> None:
    processor = Processor(("avx512",), ("avx512f", "avx512_vnni"), {})
    hidden = [flag for flag in ("avx2", "fma", "avx512_f", "avx512vnni") if processor.hides(flag)]
    assert not hidden
    lacking = ("avx512_bf16", "avx512vbmi", "avx_vnni", "amx_tile", "avx10_2")
    assert all(processor.hides(flag) for flag in lacking)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("avx3", r"TESTS_PROCESSOR='avx3': expected one of avx2, avxvnni, "),
        ("better", r"TESTS_PROCESSOR='better': this processor lacks avx512_made_up"),
    ],
)
def test_a_processor_that_cannot_be_believed_in_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    better = Processor(("avx512",), ("avx512_made_up",), {})
    monkeypatch.setitem(PROCESSORS, "better", better)
    with pytest.raises(ValueError, match=message):
        named({VARIABLE: name})
    assert named({VARIABLE: ""}) is None


@pytest.mark.slow
def test_expectations_hold_on_avx2() -> None:
    """Those that take seconds, and a server with the switch off, since there vLLM has no kernel for
    the model. `make processors` runs all, on every lesser processor."""
    if not ops.is_available() or os.environ.get(VARIABLE) or ops.cpu_isas() == ("avx2",):
        pytest.skip("the tests run on AVX2 already, or there is no extension")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [
        "-m",
        "not slow or e2e",
        "e2e/test_serve.py::test_switched_off_the_checkpoint_is_vllms",
    ]
    command += [file for file in TESTS if not file.startswith("e2e")]
    ended = subprocess.run(
        command,
        env=_environment("avx2"),
        cwd=_REPOSITORY / "tests",
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert ended.returncode == 0, ended.stdout[-6000:]
    passed = re.search(r"(\d+) passed", ended.stdout)
    assert passed is not None
    assert int(passed[1]) > 1000, ended.stdout[-2000:]
