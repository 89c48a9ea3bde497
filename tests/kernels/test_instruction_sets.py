# SPDX-License-Identifier: Apache-2.0
"""Which instruction sets the kernel tests run on here, and how many tests that leaves out."""

from collections import Counter

import pytest

from vllm_plugin_tm import envs
from vllm_plugin_tm.kernels import ops


@pytest.mark.parametrize("name", envs.ISAS)
def test_kernels_run_on(name: str, extension: None, left_out: Counter[str]) -> None:
    if name not in ops.cpu_isas():
        pytest.skip(f"this processor has no {name}: {left_out[name]} kernel tests are left out")
    assert left_out[name] == 0
