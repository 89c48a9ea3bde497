# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism over two processes on two cores: the same answers as on one."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import e2e_models
import float_models
import pytest
import torch
from conftest import Preloaded
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tools import make_model

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

PROMPTS = [[7, 301, 44, 12, 500, 3, 3, 99, 128, 64, 250], [5]]

ENGINE = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "max_model_len": 64,
    "max_num_seqs": 4,
    "max_logprobs": -1,
    "kv_cache_memory_bytes": 2**24,
}
# Scheme -> options. Blocks of 64 fit a shard's keys and values, which are of one head.
FP8: dict[str, dict[str, Any]] = {
    "fp8": {},
    "fp8-block": {"block_size": 64, "scales": "ue8m0"},
}


@pytest.fixture(scope="module")
def cores() -> str:
    """Two cores, one for each worker, in vLLM's notation."""
    available = sorted(os.sched_getaffinity(0))
    if len(available) < 2:
        pytest.skip(f"two cores are needed, this process may use {len(available)}")
    return f"{available[0]}|{available[1]}"


@pytest.fixture(scope="module")
def results(
    models: Path, cores: str, run_engines: Callable[..., list[dict[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """By name: one engine with one worker, one with two, one with two that quantizes while it
    loads. Group 64: row-parallel layers have whole groups in each shard. Channel: their scales are
    replicated."""
    source = e2e_models.tiny(models, "qwen2")
    checkpoints = {
        "g64-asymmetric": e2e_models.quantized(source, 64, symmetric=False),
        "channel": e2e_models.quantized(source, make_model.CHANNEL),
    }
    online = {
        "g64-asymmetric": {"group_size": 64, "symmetric": False},
        "channel": {"group_size": "channel"},
    }
    kinds = [(name, path, {}) for name, path in checkpoints.items()]
    quantized = [
        (name, source, {"quantization": "tm_w4a16", "additional_config": {"tm_online": options}})
        for name, options in online.items()
    ]
    jobs = {
        parallel: [
            {
                "engine": {
                    "model": str(path),
                    **how,
                    **ENGINE,
                    "tensor_parallel_size": parallel,
                },
                "prompts": PROMPTS,
                "tokens": 16,
                "workers": True,
                "spawn": parallel == 2 and name == "g64-asymmetric",
            }
            for name, path, how in (kinds if parallel == 1 else kinds + quantized)
        ]
        for parallel in (1, 2)
    }
    binding = {1: cores.split("|")[0], 2: cores}
    answers = [
        run_engines(f"parallel-{parallel}", jobs[parallel], VLLM_CPU_OMP_THREADS_BIND=bind)
        for parallel, bind in binding.items()
    ]
    one, two = answers
    count = len(checkpoints)
    columns = (one, two[:count], two[count:])
    return {name: list(row) for name, *row in zip(checkpoints, *columns, strict=True)}


@pytest.mark.parametrize("name", ["g64-asymmetric", "channel"])
def test_two_workers_answer_as_one(results: dict[str, list[dict[str, Any]]], name: str) -> None:
    """Greedy tokens are equal; log-probabilities differ by the order of float32 sums, which each
    row-parallel layer splits in two: a few units of 2**-24 in norm, as between us and the reference
    in test_models.py, where a scale error of 1 % gives 3e-3."""
    one, two, _ = (result["answers"][0] for result in results[name])
    assert one["tokens"] == two["tokens"]
    for alone, shared in zip(one["logprobs"], two["logprobs"], strict=True):
        assert float((shared - alone).norm() / alone.norm()) <= 2e-6


@pytest.mark.parametrize("name", ["g64-asymmetric", "channel"])
def test_quantizing_while_loading_gives_the_same_codes(
    results: dict[str, list[dict[str, Any]]], name: str
) -> None:
    """Two workers that quantize their shards and two that load those of the converted checkpoint:
    bit for bit. Scales of whole rows come from both shards."""
    _, converted, online = (result["answers"][0] for result in results[name])
    assert converted["tokens"] == online["tokens"]
    for a, b in zip(converted["logprobs"], online["logprobs"], strict=True):
        assert torch.equal(a, b)


def test_both_workers_are_patched(results: dict[str, list[dict[str, Any]]]) -> None:
    """Two processes of their own, each with every patch applied and all eight layers on our kernel,
    each on one thread."""
    for two in (result for _, *both in results.values() for result in both):
        first, second = two["workers"]
        assert len({first["pid"], second["pid"], os.getpid()}) == 3
        assert first["patches"] == second["patches"]
        assert first["patches"]
        assert all("applied" in row for row in first["patches"])
        for worker in (first, second):
            assert ("TMWNA16LinearKernel", True, 8) in worker["layers"]
            assert worker["threads"] == 1


def test_results_are_of_numbers(results: dict[str, list[dict[str, Any]]]) -> None:
    for pair in results.values():
        for result in pair:
            assert all(torch.isfinite(p).all() for p in result["answers"][0]["logprobs"])


@pytest.fixture(scope="module")
def fp8_results(
    models: Path, cores: str, run_engines: Callable[..., list[dict[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """By scheme: two workers with the converted checkpoint of a model with experts, and two that
    quantize while they load. Not one worker: what is rounded per token differs in shards."""
    plain = e2e_models.tiny(models, "qwen3_moe")
    engines: list[dict[str, Any]] = []
    for scheme, options in FP8.items():
        target = plain.with_name(f"{plain.name}-{scheme}-shards")
        made = make_model.quantize_checkpoint(plain, target, scheme, **options)
        online = {
            "quantization": f"tm_{scheme.replace('-', '_')}",
            "additional_config": {"tm_online": options},
        }
        engines += [{"model": str(made)}, {"model": str(plain), **online}]
    jobs = [
        {
            "engine": {**engine, **ENGINE, "tensor_parallel_size": 2},
            "prompts": PROMPTS,
            "tokens": 16,
            "workers": True,
        }
        for engine in engines
    ]
    found = run_engines("parallel-fp8", jobs, VLLM_CPU_OMP_THREADS_BIND=cores)
    return {scheme: found[2 * index : 2 * index + 2] for index, scheme in enumerate(FP8)}


@pytest.mark.parametrize("scheme", FP8)
def test_quantizing_to_fp8_while_loading_gives_the_same_codes(
    fp8_results: dict[str, list[dict[str, Any]]], scheme: str
) -> None:
    """Bit for bit, linear layers and experts, all on our kernels in both workers."""
    converted, online = (result["answers"][0] for result in fp8_results[scheme])
    assert converted["tokens"] == online["tokens"]
    for a, b in zip(converted["logprobs"], online["logprobs"], strict=True):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b)
    for worker in (worker for result in fp8_results[scheme] for worker in result["workers"]):
        assert ("TMFp8LinearKernel", True, 4) in worker["layers"]
        assert ("TMFloatExpertsKernel", True, 2) in worker["layers"]


@dataclass(frozen=True)
class FloatCase:
    """A checkpoint of float weights, and the kernel that runs `count` of its layers in a shard."""

    architecture: str
    kind: str
    kernel: str
    count: int
    dtype: str = "float32"

    @property
    def kept(self) -> bool:
        """Whether activations are kept: then a shard computes the same terms."""
        return self.kind in ("nvfp4", "mxfp4", "fp8-a16")

    def __str__(self) -> str:
        return f"{self.architecture}-{self.kind}"

    def checkpoint(self, models: Path) -> Path:
        """Made once."""
        plain = e2e_models.tiny(models, self.architecture)
        if self.kind.endswith("fp4"):
            return float_models.quantized(plain, self.kind)
        if "block" not in self.kind:
            target = plain.with_name(f"{plain.name}-fp8")
            made = make_model.quantize_checkpoint(plain, target, "fp8")
            return float_models.without_rounding(made) if self.kept else made
        block = int(self.kind.rpartition("-")[2])
        target = plain.with_name(f"{plain.name}-fp8-block-{block}")
        made = make_model.quantize_checkpoint(plain, target, "fp8-block", block_size=block)
        return float_models.as_deepseek(made, block)


FLOATS = (
    FloatCase("qwen2", "nvfp4", "TMNvFp4LinearKernel", 8),
    FloatCase("qwen3_moe", "mxfp4", "TMFloatExpertsKernel", 2),
    FloatCase("llama", "fp8-a16", "TMWFp8A16LinearKernel", 8),
    FloatCase("llama", "fp8", "TMFp8LinearKernel", 8),
    # A shard's keys and values are of one head, 64 rows. This method takes no float32.
    FloatCase("llama", "fp8-block-64", "TMFp8LinearKernel", 8, "bfloat16"),
)


@pytest.fixture(scope="module")
def float_results(
    models: Path, cores: str, run_engines: Callable[..., list[dict[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """By case: one worker and two with the same checkpoint."""
    jobs = {
        parallel: [
            {
                "engine": {
                    "model": str(case.checkpoint(models)),
                    **ENGINE,
                    "dtype": case.dtype,
                    "tensor_parallel_size": parallel,
                },
                "prompts": PROMPTS[:1],
                "workers": True,
            }
            for case in FLOATS
        ]
        for parallel in (1, 2)
    }
    one = run_engines("floats-1", jobs[1], VLLM_CPU_OMP_THREADS_BIND=cores.split("|")[0])
    two = run_engines("floats-2", jobs[2], VLLM_CPU_OMP_THREADS_BIND=cores)
    return {str(case): list(pair) for case, *pair in zip(FLOATS, one, two, strict=True)}


@pytest.mark.parametrize("case", FLOATS, ids=str)
def test_shards_of_float_checkpoints_answer_as_the_whole(
    float_results: dict[str, list[dict[str, Any]]], models: Path, case: FloatCase
) -> None:
    """Kept activations: as integers above. Rounded ones: a shard of a row-parallel layer rounds by
    its own largest activation (and a flip of one code is a jump), so the two are as far apart as
    roundings are: nearer than the quantized model is to the one it was made of, while a shard with
    another's weights or scales is many times as far."""
    one, two = float_results[str(case)]
    assert len(two["workers"]) == 2
    for worker in (*one["workers"], *two["workers"]):
        assert (case.kernel, True, case.count) in worker["layers"], worker["layers"]
    (alone,), (shared,) = (result["answers"][0]["logprobs"] for result in (one, two))
    assert torch.isfinite(alone).all()
    found = float((shared - alone).norm() / alone.norm())
    plain = e2e_models.log_probabilities(
        AutoModelForCausalLM.from_pretrained(
            e2e_models.tiny(models, case.architecture), dtype=torch.float32
        ),
        PROMPTS[0],
    )
    far = float((alone - plain).norm() / plain.norm())
    assert found <= (2e-6 if case.kept else far)


def test_blocks_that_a_shard_cuts_are_refused(
    models: Path, cores: str, preloaded: Preloaded
) -> None:
    """128 rows of keys in blocks of 128, of which each of two workers would have the half. Upstream
    itself lets fused layers of this method through, and fails while it loads their scales."""
    checkpoint = FloatCase("llama", "fp8-block-128", "", 0).checkpoint(models)
    engine = {"model": str(checkpoint), **ENGINE, "dtype": "bfloat16", "tensor_parallel_size": 2}
    job = {"engine": engine, "prompts": PROMPTS[:1]}
    ended = preloaded.engine("cut-blocks", [job], {"VLLM_CPU_OMP_THREADS_BIND": cores})
    assert ended.status != 0
    assert ended.left == []
    words = (
        r"model\.layers\.0\.self_attn\.qkv_proj: the output size of a shard \(64, of "
        r"\[128, 64, 64\]\) must be a multiple of the 128 output rows of a block"
    )
    assert re.search(words, ended.output), ended.output[-4000:]


@pytest.fixture(scope="module")
def head_results(
    models: Path, cores: str, run_engines: Callable[..., list[dict[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Two workers each, of one head: from the converter, and quantized while it is loaded, with
    weights of its own and tied. The vocabulary is padded in the second worker."""
    sizes = {"vocab_size": 510}
    tied = e2e_models.tiny(models, "llama", tie_word_embeddings=True, **sizes)
    untied = _untied(tied, models / f"{tied.name}-untied")
    converted = make_model.quantize_checkpoint(
        untied, models / f"{tied.name}-head-w8a16", "w8a16", targets=("lm_head",)
    )
    online = {"additional_config": {"tm_online": {"lm_head": "w8a16"}}}
    engines: dict[str, dict[str, Any]] = {
        "converted": {"model": str(converted)},
        "untied": {"model": str(untied), **online},
        "tied": {"model": str(tied), **online},
    }
    jobs = [
        {
            "engine": {**engine, **ENGINE, "tensor_parallel_size": 2},
            "prompts": PROMPTS,
            "tokens": 4,
            "workers": True,
        }
        for engine in engines.values()
    ]
    found = run_engines("parallel-head", jobs, VLLM_CPU_OMP_THREADS_BIND=cores)
    return dict(zip(engines, found, strict=True))


def _untied(tied: Path, target: Path) -> Path:
    """The same model with a head of its own that is its embedding."""
    target.mkdir(exist_ok=True)
    config = json.loads((tied / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    state = load_file(tied / make_model.WEIGHTS)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, target / make_model.WEIGHTS, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_a_head_that_is_quantized_while_loading_has_the_same_codes(
    head_results: dict[str, dict[str, Any]], name: str
) -> None:
    """Bit for bit: each worker has whole rows of the head."""
    converted, online = (head_results[key]["answers"][0] for key in ("converted", name))
    assert converted["tokens"] == online["tokens"]
    for a, b in zip(converted["logprobs"], online["logprobs"], strict=True):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b)
    for worker in head_results[name]["workers"]:
        assert ("TMWNA16LinearKernel", True, 1) in worker["layers"]
