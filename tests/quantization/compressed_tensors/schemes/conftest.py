# SPDX-License-Identifier: Apache-2.0
"""Upstream's schemes with our kernels in its lists; parameters that know their shard."""

import pytest


@pytest.fixture
def shard(monkeypatch):
    """A function (rank, size): parameters made from now on belong to that tensor-parallel shard."""
    parameter = pytest.importorskip("vllm.model_executor.parameter")

    def set_to(rank, size):
        monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: size)

    set_to(0, 1)
    return set_to


@pytest.fixture
def patched(shard):
    """The patches are applied."""
    from vllm_plugin_tm.patch import apply

    apply.apply()
    yield
    apply.remove()
