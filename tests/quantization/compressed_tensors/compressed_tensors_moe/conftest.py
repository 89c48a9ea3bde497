# SPDX-License-Identifier: Apache-2.0
"""Upstream's methods for routed experts with ours before them, on a processor without AMX."""

import pytest


@pytest.fixture
def patched(monkeypatch):
    """The patches are applied; no AMX is to be seen, for which upstream has kernels. One thread: on
    a busy machine many small products wait for each other."""
    pytest.importorskip("vllm")
    import torch

    from vllm_plugin_tm.patch import apply

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    apply.apply()
    yield
    apply.remove()
    torch.set_num_threads(threads)
