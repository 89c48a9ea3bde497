# SPDX-License-Identifier: Apache-2.0
"""Peers without AMX, in processes of their own: what is hidden stays so in a process."""

import os
import subprocess
import sys

import pytest

from vllm_plugin_tm.bench import machine

_PRODUCT = """
import torch
x = torch.ones(256, 256, dtype=torch.bfloat16)
torch.nn.functional.linear(x, x)
"""
_HIDE = "from vllm_plugin_tm.bench import amx, machine\namx.hide()\n"
_HAS_AMX = "import torch; print(torch.cpu._is_amx_tile_supported())"


def _output(script):
    environment = {**os.environ, "ONEDNN_VERBOSE": "1"}
    for name in ("ONEDNN_MAX_CPU_ISA", "PYTHONPATH"):  # the tests' own way to hide it
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_and_its_products_do_without():
    assert "amx" not in _output(_HIDE + _PRODUCT).lower()
    assert _output(_HIDE + _HAS_AMX).split()[-1] == "False"


def test_there_is_something_to_hide():
    if "amx_bf16" not in machine.describe(1).flags:
        pytest.skip("there is nothing to hide: no AMX here")
    assert "amx" in _output(_PRODUCT).lower()


def test_children_and_reports_know():
    script = (
        _HIDE
        + """
import subprocess, sys
child = "from vllm_plugin_tm.bench import amx; print(amx.is_hidden())"
print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout)
here = machine.describe(threads=1)
has = any(flag.startswith("amx") for flag in here.flags)
print(here.amx_hidden == has, ("hidden" in here.summary) == has)
"""
    )
    assert _output(script).split()[-3:] == ["True"] * 3
