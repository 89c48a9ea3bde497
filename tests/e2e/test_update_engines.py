# SPDX-License-Identifier: Apache-2.0
"""Updates of the weights of running engines: the answers are those of a fresh load, and a
wrong update changes none. tests/patch/test_updates.py has what can be wrong."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import e2e_models
import pytest
import torch
from safetensors.torch import load_file, save_file

from tools import make_model

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

PROMPTS = [[7, 301, 44, 12, 500, 3, 3, 99], [5]]
MODELS = ("linear, quantized before", "experts, quantized while loading")


def _wrong(checkpoint: Path, folder: Path, spoil: Callable[[dict[str, torch.Tensor]], None]) -> str:
    """A copy of a checkpoint's weights, spoilt."""
    tensors = load_file(checkpoint / make_model.WEIGHTS)
    spoil(tensors)
    save_file(tensors, folder / make_model.WEIGHTS, metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def results(
    models: Path,
    run_engines: Callable[..., list[dict[str, Any]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, list[dict[str, Any]]]:
    """By model, two engines: one begins with seed 0 and gets wrong updates and then seed 1, by a
    session of two files; the other begins with seed 1 and is reloaded with seed 0."""
    plain = [e2e_models.tiny(models, "qwen3_moe", seed=seed) for seed in (0, 1)]
    quantized = [e2e_models.quantized(e2e_models.tiny(models, seed=seed)) for seed in (0, 1)]
    jobs = []
    for name, (first, second), how in (
        (MODELS[0], quantized, {}),
        (MODELS[1], plain, {"quantization": "tm_w4a8", "enforce_eager": True}),
    ):
        weights = load_file(second / make_model.WEIGHTS)
        last = sorted(tensor for tensor in weights if "layers.1" in tensor and "proj" in tensor)[-1]
        folder = tmp_path_factory.mktemp(name.replace(", ", "-"))
        halves = []
        for index, part in enumerate((sorted(weights)[::2], sorted(weights)[1::2])):
            halves.append([str(folder / f"{index}.safetensors")])
            save_file({tensor: weights[tensor] for tensor in part}, halves[-1][0])

        def without(tensors: dict[str, torch.Tensor], last: str = last) -> None:
            del tensors[last]

        def nan(tensors: dict[str, torch.Tensor]) -> None:
            tensors["model.norm.weight"][3] = float("nan")

        engine = {
            "dtype": "bfloat16",
            "skip_tokenizer_init": True,
            "max_model_len": 64,
            "max_num_seqs": 4,
            "max_logprobs": -1,
            "kv_cache_memory_bytes": 2**24,
            "enable_prefix_caching": False,
            "weight_transfer_config": {"backend": "tm_safetensors"},
            **how,
        }
        bad = [tmp_path_factory.mktemp("bad") for _ in range(2)]
        updates = [
            {"session": [[_wrong(second, bad[0], without) + f"/{make_model.WEIGHTS}"]]},
            {"reload": _wrong(second, bad[1], nan)},
            {"session": halves[:1]},
            {"session": halves},
        ]
        common = {"prompts": PROMPTS, "tokens": 4}
        jobs += [
            {"engine": engine | {"model": str(first)}, "updates": updates, **common},
            {
                "engine": engine | {"model": str(second)},
                "updates": [{"reload": str(first)}],
                **common,
            },
        ]
    answers = run_engines("updates", jobs)
    return {name: answers[2 * index : 2 * index + 2] for index, name in enumerate(MODELS)}


def _equal(got: dict[str, Any], want: dict[str, Any]) -> bool:
    return got["tokens"] == want["tokens"] and all(
        map(torch.equal, got["logprobs"], want["logprobs"])
    )


@pytest.mark.parametrize("name", MODELS)
def test_updates_equal_a_fresh_load(results: dict[str, list[dict[str, Any]]], name: str) -> None:
    """Each engine ends with what the other began with, bit for bit; one model is compiled."""
    one, other = results[name]
    assert (one["compilation"] == "DYNAMO_TRACE_ONCE") == (name == MODELS[0])
    assert not _equal(one["answers"][0], other["answers"][0])
    for updated, fresh in ((one, other), (other, one)):
        last = updated["updates"][-1]
        assert last["refused"] is None
        assert _equal(last["answers"], fresh["answers"][0])


@pytest.mark.parametrize("name", MODELS)
def test_wrong_updates_change_nothing(results: dict[str, list[dict[str, Any]]], name: str) -> None:
    """A missing tensor, a NaN, a session that ends half sent: refused, and the engine answers as it
    did before, bit for bit."""
    engine = results[name][0]
    for step, words in zip(
        engine["updates"],
        ("missing in the update", "model.norm.weight", "missing in"),
        strict=False,
    ):
        assert "the old ones still serve" in step["refused"]
        assert words in step["refused"]
        assert _equal(step["answers"], engine["answers"][0])
        assert step["tensors"] == engine["tensors"][0]


@pytest.mark.parametrize("name", MODELS)
def test_requests_go_on_until_an_update_is_finished(
    results: dict[str, list[dict[str, Any]]], name: str
) -> None:
    """With the old weights."""
    engine = results[name][0]
    during = [step["during"] for step in engine["updates"] if step["during"] is not None]
    assert len(during) == 3
    assert all(_equal(answers, engine["answers"][0]) for answers in during)


def test_what_one_of_two_workers_refuses_none_has(
    models: Path, run_engines: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    """A code that is no 4-bit number, in the half of a matrix that only the second worker reads."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip(f"two cores are needed, this process may use {len(cores)}")
    first, second = (
        make_model.quantize_checkpoint(
            source, source.with_name(f"{source.name}-w4a8-g64"), "w4a8", group_size=64
        )
        for source in (e2e_models.tiny(models, seed=seed) for seed in (0, 1))
    )
    name = "model.layers.1.mlp.down_proj.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, -1] = 100

    engine = {
        "model": str(first),
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 64,
        "max_num_seqs": 4,
        "max_logprobs": -1,
        "kv_cache_memory_bytes": 2**24,
        "enable_prefix_caching": False,
        "tensor_parallel_size": 2,
    }
    updates = [{"reload": path} for path in (_wrong(second, tmp_path, spoil), str(second))]
    (result,) = run_engines(
        "updates-parallel",
        [{"engine": engine, "prompts": PROMPTS, "tokens": 4, "updates": updates}],
        VLLM_CPU_OMP_THREADS_BIND=f"{cores[0]}|{cores[1]}",
    )
    wrong, right = result["updates"]
    assert f"old ones still serve: {name}: values of" in wrong["refused"]
    assert _equal(wrong["answers"], result["answers"][0])
    assert right["refused"] is None
    assert not _equal(right["answers"], result["answers"][0])
