# SPDX-License-Identifier: Apache-2.0
"""Bad checkpoints and bad settings, given to a real `vllm serve` or to its engine: it says what is
wrong by name, ends with a status that is not 0, and leaves no process behind."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import e2e_models
import pytest
import torch
from conftest import Child, Ended, Preloaded, results_of, serve_command
from safetensors.torch import load_file, save_file

from tools import make_model
from tools.server import free_port

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

LAYER = "model.layers.1.mlp.down_proj"
Tensors = dict[str, torch.Tensor]
ENGINE = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "max_model_len": 64,
    "kv_cache_memory_bytes": 2**24,
}


def _missing(tensors: Tensors) -> None:
    del tensors[f"{LAYER}.weight_packed"]


def _surplus(tensors: Tensors) -> None:
    tensors[f"{LAYER}.weight_surplus"] = torch.ones(4)


def _nan(tensors: Tensors) -> None:
    tensors[f"{LAYER}.weight_scale"][17, 2] = float("nan")


@dataclass(frozen=True)
class Refusal:
    """What is given to an engine, and the words that its refusal must contain. One of a checkpoint
    and one of the environment are the server's, the others those of an engine alone."""

    words: tuple[str, ...]
    spoil: Callable[[Tensors], None] | None = None
    truncate: int = 0
    workers: int = 1
    server: bool = False
    settings: dict[str, str] = field(default_factory=dict)
    model: dict[str, int] = field(default_factory=dict)
    group_size: int = 32


CASES = {
    "missing": Refusal((f"{LAYER}.weight_packed", "missing"), _missing),
    "surplus": Refusal((f"{LAYER}.weight_surplus",), _surplus),
    "nan": Refusal((f"{LAYER}.weight_scale", "nan", "output row 17, group 2"), _nan, server=True),
    "truncated": Refusal((make_model.WEIGHTS, "truncated"), truncate=1000),
    # 320 = 5 groups of 64; each of two shards has 160.
    "group-across-shards": Refusal(
        ("down_proj", "160", "64"),
        workers=2,
        model={"intermediate_size": 320},
        group_size=64,
    ),
    "switch": Refusal(
        ("VLLM_PLUGIN_TM", "'yes'", '"1"'), settings={"VLLM_PLUGIN_TM": "yes"}, server=True
    ),
    "instruction-set": Refusal(
        ("VLLM_PLUGIN_TM_ISA", "'avx9'", "avx512"), settings={"VLLM_PLUGIN_TM_ISA": "avx9"}
    ),
    "misspelt": Refusal(
        ("VLLM_PLUGIN_TM_IAS", "VLLM_PLUGIN_TM_ISA"), settings={"VLLM_PLUGIN_TM_IAS": "avx2"}
    ),
}


def _checkpoint(case: Refusal, models: Path, target: Path) -> Path:
    """A copy of a good checkpoint, spoilt."""
    source = e2e_models.quantized(e2e_models.tiny(models, **case.model), case.group_size)
    shutil.copytree(source, target)
    weights = target / make_model.WEIGHTS
    if case.spoil is not None:
        tensors = load_file(weights)
        case.spoil(tensors)
        save_file(tensors, weights, metadata={"format": "pt"})
    if case.truncate:
        os.truncate(weights, weights.stat().st_size - case.truncate)
    return target


def _serve(name: str, checkpoint: Path, settings: dict[str, str]) -> Ended:
    arguments = ["--port", str(free_port()), "--skip-tokenizer-init", "--enforce-eager"]
    arguments += ["--max-model-len", "64", "--kv-cache-memory-bytes", str(2**24)]
    command = serve_command(checkpoint, *arguments)
    return Child(name, command, {"VLLM_PLUGIN_TM": "1", **settings}).wait()


@pytest.mark.parametrize("name", CASES)
def test_refused(models: Path, preloaded: Preloaded, tmp_path: Path, name: str) -> None:
    """The words are in one message that was printed: a line, or a headline and its list."""
    case = CASES[name]
    words, settings, cores = case.words, dict(case.settings), sorted(os.sched_getaffinity(0))
    if case.workers > len(cores):
        pytest.skip(f"{case.workers} cores are needed for as many workers")
    if case.workers > 1:
        settings["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, cores[: case.workers]))
    checkpoint = _checkpoint(case, models, tmp_path / name)
    if case.server:
        ended = _serve(f"refused-{name}", checkpoint, settings)
    else:
        engine = {**ENGINE, "model": str(checkpoint), "tensor_parallel_size": case.workers}
        job = {"engine": engine, "prompts": [[1]]}
        ended = preloaded.engine(f"refused-{name}", [job], settings)
    assert ended.status > 0, ended.output[-3000:]
    assert ended.left == []
    lines = ended.output.splitlines()
    pairs = [f"{line}\n{after}" for line, after in zip(lines, [*lines[1:], ""], strict=True)]
    assert any(all(word in pair for word in words) for pair in pairs), (
        f"no message has all of {words}:\n" + "\n".join(x for x in lines if "Error" in x)[-4000:]
    )
    assert "Application startup complete" not in ended.output
    assert not results_of(f"refused-{name}").exists()
