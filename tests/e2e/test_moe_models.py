# SPDX-License-Identifier: Apache-2.0
"""Whole seeded models with routed experts: against transformers with the dequantized weights, on
two workers (tensor and expert parallel), reloaded; DeepSeek's routing against upstream's."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import e2e_models
import pytest
import torch

from tools import make_model

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

PROMPTS = [[7, 301, 44, 12, 500, 3, 3, 99, 128, 64, 250], [5], [400 - i for i in range(70)]]


@dataclass(frozen=True)
class Model:
    """One tiny model and its format; float32 activations, so that a tie of the router, which a
    rounding could turn, does not occur."""

    architecture: str
    scheme: str
    how: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return "-".join([self.architecture, self.scheme, *map(str, self.how.values())])

    def checkpoint(self, folder: Path, seed: int = 0) -> Path:
        """Made once, quantized."""
        plain = e2e_models.tiny(folder, self.architecture, seed)
        target = plain.with_name(f"{plain.name}-{self}")
        return make_model.quantize_checkpoint(plain, target, self.scheme, **self.how)


KEPT = (
    Model("qwen3_moe", "w4a16", {"group_size": 32}),
    Model("qwen3_moe", "w8a16", {"group_size": 64, "symmetric": False}),
    Model("mixtral", "w4a16", {"group_size": 64, "symmetric": False}),
    Model("mixtral", "w4a16", {"group_size": make_model.CHANNEL}),
)
ROUNDED = (
    Model("qwen3_moe", "w4a8", {"group_size": 32}),
    Model("mixtral", "w8a8", {}),
)
DEEPSEEK = Model("deepseek_v3", "w4a16", {"group_size": 32})
SHARED = Model("qwen3_moe", "w4a16", {"group_size": 64, "symmetric": False})


def _engine(path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(path),
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "max_logprobs": -1,
        "kv_cache_memory_bytes": 2**25,
        "enable_prefix_caching": False,
    } | changes


@pytest.fixture(scope="module")
def results(models: Path, run_engines: Callable[..., list[dict[str, Any]]]) -> dict[str, Any]:
    """All models, one after the other, in one process of vLLM."""
    every = (*KEPT, *ROUNDED, DEEPSEEK, SHARED)
    jobs = [
        {
            "engine": _engine(model.checkpoint(models)),
            "prompts": PROMPTS,
            "tokens": 16,
            "workers": True,
        }
        for model in every
    ]
    answers = run_engines("moe-models", jobs, VLLM_MLA_DISABLE="1")
    return {str(model): answer for model, answer in zip(every, answers, strict=True)}


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _reference(model: Model, models: Path, **how: Any) -> torch.Tensor:
    reference = e2e_models.transformers_model(model.checkpoint(models), **how)
    return torch.cat([e2e_models.log_probabilities(reference, prompt) for prompt in PROMPTS])


@pytest.mark.parametrize("model", KEPT, ids=str)
def test_log_probabilities(results: dict[str, Any], models: Path, model: Model) -> None:
    """Of the whole vocabulary after every token of the prompts, in norm: float32 sums in another
    order, as in test_models.py, with two more matrices in a row."""
    want = _reference(model, models)
    got = torch.cat(results[str(model)]["answers"][0]["logprobs"])
    assert _distance(got, want) <= 3e-6
    assert _distance(got, _reference(model, models, scale_factor=1.01)) > 1e-4


@pytest.mark.parametrize("model", ROUNDED, ids=str)
def test_log_probabilities_with_rounded_activations(
    results: dict[str, Any], models: Path, model: Model
) -> None:
    """Rounding to 8 bits costs each layer about 1 % of noise, which also moves routers near a tie:
    a tenth for the whole is enough, and experts that are mixed up give more than one."""
    want = _reference(model, models)
    got = torch.cat(results[str(model)]["answers"][0]["logprobs"])
    assert 1e-4 < _distance(got, want) < 0.1


def test_deepseek_routing_is_upstreams(
    results: dict[str, Any], models: Path, run_engines: Callable[..., list[dict[str, Any]]]
) -> None:
    """Shared experts, groups of experts, sigmoid scores with a correction, routed scaling: the same
    answers as upstream gives without us for the dequantized weights."""
    quantized = DEEPSEEK.checkpoint(models)
    plain = e2e_models.dequantized_checkpoint(quantized)
    (answer,) = run_engines(
        "moe-deepseek",
        [{"engine": _engine(plain), "prompts": PROMPTS}],
        VLLM_PLUGIN_TM="0",
        VLLM_MLA_DISABLE="1",
    )
    got, want = (
        torch.cat(result["answers"][0]["logprobs"]) for result in (results[str(DEEPSEEK)], answer)
    )
    assert _distance(got, want) <= 1e-5


def test_every_layer_ran_on_our_kernels(results: dict[str, Any]) -> None:
    """Two layers with experts (DeepSeek: one, its first is dense), and their attention."""
    for model in (*KEPT, *ROUNDED, DEEPSEEK):
        (worker,) = results[str(model)]["workers"]
        ours = {kernel: count for kernel, on_tm, count in worker["layers"] if on_tm}
        assert ours.pop("TMExpertsKernel") == (1 if model is DEEPSEEK else 2), str(model)
        assert sum(ours.values()) == (12 if model is DEEPSEEK else 4), str(model)


@pytest.fixture(scope="module")
def parallel(models: Path, run_engines: Callable[..., list[dict[str, Any]]]) -> dict[str, Any]:
    """Two workers that split each expert; two that have half of the experts each."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip(f"two cores are needed, this process may use {len(cores)}")
    path = SHARED.checkpoint(models)
    two = {"tensor_parallel_size": 2}
    engines = {"tensor": two, "expert": two | {"enable_expert_parallel": True}}
    jobs = [
        {"engine": _engine(path, **more), "prompts": PROMPTS, "tokens": 16, "workers": True}
        for more in engines.values()
    ]
    bind = f"{cores[0]}|{cores[1]}"
    answers = run_engines("moe-parallel", jobs, VLLM_CPU_OMP_THREADS_BIND=bind)
    return dict(zip(engines, answers, strict=True))


@pytest.mark.parametrize("name", ["tensor", "expert"])
def test_two_workers_answer_as_one(
    results: dict[str, Any], parallel: dict[str, Any], name: str
) -> None:
    """Greedy tokens are equal; log-probabilities differ by the order of float32 sums only."""
    one, two = (result["answers"][0] for result in (results[str(SHARED)], parallel[name]))
    assert one["tokens"] == two["tokens"]
    for alone, shared in zip(one["logprobs"], two["logprobs"], strict=True):
        assert _distance(shared, alone) <= 3e-6
    for worker in parallel[name]["workers"]:
        assert ("TMExpertsKernel", True, 2) in worker["layers"]


def test_reloading_a_compiled_engine(
    models: Path, run_engines: Callable[..., list[dict[str, Any]]]
) -> None:
    """New values, and back to the first: parameters, their addresses and answers as after a fresh
    load, bit for bit."""
    model = KEPT[0]
    first, second = (str(model.checkpoint(models, seed)) for seed in (0, 1))

    def job(path: str, **more: Any) -> dict[str, Any]:
        engine = _engine(Path(path), dtype="bfloat16", enforce_eager=False)
        return {"engine": engine, "prompts": PROMPTS[:2], "tokens": 4, **more}

    running, fresh = run_engines("moe-reload", [job(first, reloads=[second, first]), job(second)])
    assert running["compilation"] == "DYNAMO_TRACE_ONCE"
    for step, want in ((1, fresh), (2, running)):
        assert running["tensors"][step] == want["tensors"][0]
        got, expected = running["answers"][step], want["answers"][0]
        assert got["tokens"] == expected["tokens"]
        assert all(map(torch.equal, got["logprobs"], expected["logprobs"]))
    assert running["tensors"][0] != running["tensors"][1]
    assert all(other == running["addresses"][0] for other in running["addresses"])
