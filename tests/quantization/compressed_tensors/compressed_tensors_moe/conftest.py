# SPDX-License-Identifier: Apache-2.0
"""Upstream's methods for routed experts with ours before them."""

import pytest


@pytest.fixture
def patched():
    """The patches are applied. One thread: on a busy machine many small products wait for each
    other."""
    pytest.importorskip("vllm")
    import torch

    from vllm_plugin_tm.patch import apply

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    apply.apply()
    yield
    apply.remove()
    torch.set_num_threads(threads)
