# SPDX-License-Identifier: Apache-2.0
"""The limit loops of the extension really do the work that they are timed for."""

import pytest
import torch

from vllm_plugin_tm.bench.limits import LOOPS
from vllm_plugin_tm.kernels import ops

pytestmark = pytest.mark.skipif(not ops.is_available(), reason="extension not built")


@pytest.fixture(autouse=True)
def _loaded():
    ops.load()
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("words", [8, 64, 72, 8 * 1001])
@pytest.mark.parametrize("offset", [0, 1])
def test_every_line_is_read(threads, words, offset):
    torch.set_num_threads(threads)
    buffer = torch.randint(-(2**62), 2**62, (words + offset,))[offset:]
    read = torch.ops.vllm_plugin_tm.limit_read(buffer)
    assert (read - int(buffer.sum())) % 2**64 == 0
    buffer[-1] += 1
    assert torch.ops.vllm_plugin_tm.limit_read(buffer) != read


def test_an_empty_buffer_has_nothing_to_read():
    assert torch.ops.vllm_plugin_tm.limit_read(torch.empty(0, dtype=torch.uint8)) == 0


@pytest.mark.parametrize("kind", LOOPS)
def test_work_done_is_counted(kind):
    torch.set_num_threads(1)
    once = torch.ops.vllm_plugin_tm.limit_dot(kind, 10)
    assert torch.ops.vllm_plugin_tm.limit_dot(kind, 30) == 3 * once
    if ops.cpu_isas() and kind == "fma32":
        assert once > 0
    if "avx512bf16" in ops.cpu_isas() and kind == "bf16":
        assert once == 10 * 16 * 32  # rounds, independent instructions, products of each
    if kind.startswith("amx"):
        # As the extension sees the processor, whatever the tests are made to believe.
        assert (once > 0) == ("amx" in torch.ops.vllm_plugin_tm.cpu_isas().split(","))


def test_unknown_kind_is_named():
    with pytest.raises(RuntimeError, match=r"'kind': expected .*, given 'fp8'"):
        torch.ops.vllm_plugin_tm.limit_dot("fp8", 1)
