# SPDX-License-Identifier: Apache-2.0
"""AWQ and GPTQ checkpoints that AutoRound has written, in vLLM against transformers with the
weights as AutoRound dequantizes them: no code of ours has a part in either. Needs an environment
with AutoRound (`build/peers/auto-round`, made as docs/kernels.md says)."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import e2e_models
import pytest
import torch
from transformers import AutoModelForCausalLM

from tools import layout, make_model

PEER = layout.BUILD / "peers" / "auto-round" / "bin" / "python"
WRITER = Path(__file__).with_name("auto_round_writer.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.e2e,
    pytest.mark.skipif(not PEER.exists(), reason="no environment with AutoRound"),
]

PROMPT = [7, 301, 44, 12, 500, 3, 3, 99, 128, 64, 250]


@dataclass(frozen=True)
class Case:
    """One checkpoint, and the kernel that runs `count` of its layers."""

    architecture: str
    format: str
    bits: int
    group_size: int
    symmetric: bool
    kernel: str = "TMWNA16LinearKernel"
    count: int = 8

    def __str__(self) -> str:
        symmetry = "sym" if self.symmetric else "asym"
        return f"{self.architecture}-{self.format}-w{self.bits}-g{self.group_size}-{symmetry}"


CASES = (
    Case("llama", "auto_gptq", 4, 32, True),
    Case("qwen2", "auto_gptq", 4, 128, True),
    Case("llama", "auto_gptq", 8, 64, True),
    Case("qwen2", "auto_gptq", 4, make_model.CHANNEL, True),
    Case("llama", "auto_awq", 4, 32, False),
    Case("qwen2", "auto_awq", 4, 128, False),
    Case("llama", "auto_awq", 4, 64, True),
    Case("qwen3_moe", "auto_gptq", 4, 32, True, "TMExpertsKernel", 2),
    Case("qwen3_moe", "auto_awq", 4, 64, False, "TMExpertsKernel", 2),
)


def folder(models: Path, case: Case) -> Path:
    """Where the case's checkpoint lies."""
    return models / f"auto-round-{case}"


@pytest.fixture(scope="module")
def written(models: Path) -> Path:
    """All checkpoints, made once by one process of the peer; their parent."""
    jobs, stamps = [], {}
    for case in CASES:
        target, recipe = folder(models, case), {"recipe": 1, **asdict(case)}
        if make_model.is_made(target, recipe):
            continue
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        plain = e2e_models.tiny(models, case.architecture)
        jobs.append({"plain": str(plain), "target": str(target), **asdict(case)})
        stamps[target] = recipe
    if jobs:
        spec = models / "auto-round.json"
        spec.write_text(json.dumps(jobs))
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        made = subprocess.run(
            [PEER, WRITER, spec],
            cwd=models,
            env=environment | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert made.returncode == 0, made.stderr[-4000:]
    for target, recipe in stamps.items():
        (target / make_model.STAMP).write_text(json.dumps(recipe))
    return models


@pytest.fixture(scope="module")
def results(written: Path, run_engines: Callable[..., list[dict[str, Any]]]) -> dict[str, Any]:
    """All of them in one process of vLLM; its AWQ and GPTQ take no float32 activations."""
    jobs = [e2e_models.job(folder(written, case) / "packed", "float16", PROMPT) for case in CASES]
    answers = run_engines("auto-round", jobs)
    return {str(case): answer for case, answer in zip(CASES, answers, strict=True)}


def reference(numbers: Path, dtype: torch.dtype, factor: float = 1.0) -> torch.Tensor:
    """transformers' log-probabilities with AutoRound's dequantized weights times `factor`."""
    model = AutoModelForCausalLM.from_pretrained(
        numbers, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name and "bias" not in name:
                parameter.mul_(factor)
    return e2e_models.log_probabilities(model.to(dtype).eval(), PROMPT)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_log_probabilities(results: dict[str, Any], written: Path, case: Case) -> None:
    """In norm, about as far from the exact result as transformers itself is in 16 bits: both round
    activations, in other places. A scale error of 1 % is several times as far."""
    result = results[str(case)]
    (worker,) = result["workers"]
    assert (case.kernel, True, case.count) in worker["layers"], worker["layers"]
    numbers = folder(written, case) / "numbers"
    want = reference(numbers, torch.float32)
    (got,) = result["answers"][0]["logprobs"]
    bound = 1.5 * distance(reference(numbers, torch.float16), want)
    assert distance(got, want) <= bound
    assert distance(got, reference(numbers, torch.float32, 1.01)) > bound
