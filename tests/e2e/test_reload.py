# SPDX-License-Identifier: Apache-2.0
"""reload_weights of a running, compiled engine: new values are served, bit for bit, and memory is
flat."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import e2e_models
import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

PROMPTS = [[7, 301, 44, 12, 500, 3, 3, 99], [5]]
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def results(models: Path, run_engines: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """An engine that starts with seed 0 and is given 1, 2 and 0; then fresh ones of 1 and 2."""
    paths = [
        str(e2e_models.quantized(e2e_models.tiny(models, "qwen2", seed=seed), 32, symmetric=False))
        for seed in SEEDS
    ]

    def job(path: str, **more: Any) -> dict[str, Any]:
        engine = {
            "model": path,
            "dtype": "bfloat16",
            "skip_tokenizer_init": True,
            "max_model_len": 64,
            "max_num_seqs": 4,
            "max_logprobs": -1,
            "kv_cache_memory_bytes": 2**24,
            "enable_prefix_caching": False,
        }
        return {"engine": engine, "prompts": PROMPTS, "tokens": 4, **more}

    reloading = job(paths[0], reloads=[paths[1], paths[2], paths[0]], again=20)
    return run_engines("reload", [reloading, *map(job, paths[1:])])


def test_the_engine_is_compiled(results: list[dict[str, Any]]) -> None:
    """So a value that the graph had kept would show."""
    assert {result["compilation"] for result in results} == {"DYNAMO_TRACE_ONCE"}


def test_reloading_equals_a_fresh_load(results: list[dict[str, Any]]) -> None:
    """Twice with new values, and back to the first: parameters and answers, bit for bit."""
    running = results[0]
    for step, fresh in ((1, results[1]), (2, results[2]), (3, running)):
        assert running["tensors"][step] == fresh["tensors"][0]
        got, want = running["answers"][step], fresh["answers"][0]
        assert got["tokens"] == want["tokens"]
        assert len(got["logprobs"]) == len(PROMPTS)
        assert all(map(torch.equal, got["logprobs"], want["logprobs"]))


def test_seeds_differ(results: list[dict[str, Any]]) -> None:
    """Or the test above would show nothing."""
    tensors = [tuple(result["tensors"][0].items()) for result in results]
    assert len(set(tensors)) == len(SEEDS)
    assert not torch.equal(*(result["answers"][0]["logprobs"][0] for result in results[:2]))


def test_kernel_tensors_stay_where_they_are(results: list[dict[str, Any]]) -> None:
    """Compiled code may hold their addresses."""
    first, *others = results[0]["addresses"]
    assert all(other == first for other in others)


def test_memory_is_flat(results: list[dict[str, Any]]) -> None:
    """Forty reloads. The first ones fill caches of the allocator; from the tenth pair on at most
    one copy of the weights (1 MiB) may come and go."""
    resident = results[0]["resident"]
    assert len(resident) == 20
    assert max(resident[10:]) - resident[9] <= 2**20, resident
