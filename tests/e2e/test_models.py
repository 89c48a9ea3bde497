# SPDX-License-Identifier: Apache-2.0
"""Whole seeded models in vLLM against transformers with the dequantized weights: every format,
fused qkv and gate_up, bias, all activation dtypes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import e2e_models
import pytest
import torch

from tools import make_model

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

CHANNEL = make_model.CHANNEL
PROMPTS = [[7, 301, 44, 12, 500, 3, 3, 99, 128, 64, 250], [5], [400 - i for i in range(70)]]


@dataclass(frozen=True)
class Model:
    """One tiny model: architecture, format and the activations' dtype."""

    architecture: str
    group_size: int
    symmetric: bool
    dtype: str = "float32"
    num_bits: int = 4

    def __str__(self) -> str:
        group = f"g{self.group_size}" if self.group_size != CHANNEL else "channel"
        symmetry = "sym" if self.symmetric else "asym"
        return f"{self.architecture}-w{self.num_bits}-{group}-{symmetry}-{self.dtype}"

    def checkpoint(self, folder: Path) -> Path:
        """Made once, quantized."""
        plain = e2e_models.tiny(folder, self.architecture)
        return e2e_models.quantized(plain, self.group_size, self.symmetric, self.num_bits)


MODELS = (
    Model("llama", 32, True),
    Model("llama", 64, False),
    Model("llama", 128, True),
    Model("llama", CHANNEL, False),
    Model("qwen2", 32, False),
    Model("qwen2", 64, True),
    Model("qwen2", 128, False),
    Model("qwen2", CHANNEL, True),
    Model("qwen2", 32, False, "bfloat16"),
    Model("llama", 32, True, "float16"),
    Model("llama", 64, True, "float32", 8),
    Model("qwen2", 32, False, "float32", 8),
    Model("qwen2", CHANNEL, True, "bfloat16", 8),
    Model("llama", 128, False, "float32", 2),
)


@pytest.fixture(scope="module")
def results(models: Path, run_engines: Callable[..., list[dict[str, Any]]]) -> dict[str, Any]:
    """All models, one after the other, in one process of vLLM."""
    jobs = [
        {
            "engine": {
                "model": str(model.checkpoint(models)),
                "dtype": model.dtype,
                "skip_tokenizer_init": True,
                "enforce_eager": True,
                "max_model_len": 128,
                "max_num_seqs": 8,
                "max_logprobs": -1,
                "kv_cache_memory_bytes": 2**25,
                "enable_prefix_caching": False,
            },
            "prompts": PROMPTS,
            "workers": True,
        }
        for model in MODELS
    ]
    answers = run_engines("models", jobs)
    return {str(model): answer for model, answer in zip(MODELS, answers, strict=True)}


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_log_probabilities(results: dict[str, Any], models: Path, model: Model) -> None:
    """Of the whole vocabulary after every token of the prompts, in norm.

    float32: both sides sum in float32, in another order, through four matrices and two layers; a
    few units of 2**-24 = 6e-8 each. 16 bits: transformers itself is off by what rounding of
    activations and weights does; our weights are exact, so we are no farther from the exact result.
    """
    checkpoint = model.checkpoint(models)
    dtype = getattr(torch, model.dtype)

    def answers(**how: Any) -> torch.Tensor:
        reference = e2e_models.transformers_model(checkpoint, **how)
        return torch.cat([e2e_models.log_probabilities(reference, prompt) for prompt in PROMPTS])

    want = answers()
    got = torch.cat(results[str(model)]["answers"][0]["logprobs"])
    assert got.shape == want.shape
    bound = 2e-6 if dtype == torch.float32 else _distance(answers(dtype=dtype), want)
    assert _distance(got, want) <= bound
    assert _distance(got, answers(scale_factor=1.01)) > bound, "a scale error of 1 % must be seen"


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_every_layer_ran_on_our_kernel(results: dict[str, Any]) -> None:
    """Four linears, fused ones among them, in each of two layers; embedding and lm_head are not."""
    for name, result in results.items():
        (worker,) = result["workers"]
        ours = [row for row in worker["layers"] if row[1]]
        assert ours == [("TMWNA16LinearKernel", True, 8)], name
