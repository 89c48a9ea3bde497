# SPDX-License-Identifier: Apache-2.0
"""Whole seeded models whose weights are floats of 8 and 4 bits, written by the compressed-tensors
library, in vLLM against transformers with the dequantized weights; and FP8 activations against
vLLM's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import e2e_models
import float_models
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tools import make_model

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

PROMPT = [7, 301, 44, 12, 500, 3, 3, 99, 128, 64, 250]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


KEPT = [
    ("llama", "fp8", "TMWFp8A16LinearKernel", 8),
    ("llama", "mxfp4", "TMMxFp4LinearKernel", 8),
    ("qwen2", "nvfp4", "TMNvFp4LinearKernel", 8),
    ("qwen3_moe", "mxfp4", "TMFloatExpertsKernel", 2),
    ("mixtral", "nvfp4", "TMFloatExpertsKernel", 2),
]


def test_kept_activations_equal_transformers(
    models: Path, tmp_path: Path, run_engines: Callable[..., list[dict[str, Any]]]
) -> None:
    """In float32 only sums in another order tell vLLM from transformers."""
    made = [
        (float_models.quantized(e2e_models.tiny(models, name), kind), kind)
        for name, kind, _, _ in KEPT
    ]
    results = run_engines(
        "floats", [e2e_models.job(checkpoint, "float32", PROMPT) for checkpoint, _ in made]
    )
    for (name, kind, kernel, count), (checkpoint, _), result in zip(
        KEPT, made, results, strict=True
    ):
        (worker,) = result["workers"]
        assert (kernel, True, count) in worker["layers"], (name, kind, worker["layers"])
        plain = float_models.dequantized(checkpoint, kind, tmp_path / checkpoint.name)
        reference = AutoModelForCausalLM.from_pretrained(
            plain, dtype=torch.float32, attn_implementation="eager"
        )
        want = e2e_models.log_probabilities(reference.eval(), PROMPT)
        (got,) = result["answers"][0]["logprobs"]
        assert distance(got, want) < 2e-6, (name, kind)  # as in test_models


def test_fp8_activations_are_rounded_as_upstream_rounds_them(
    models: Path, run_engines: Callable[..., list[dict[str, Any]]]
) -> None:
    """The converter's FP8 model with the switch on and off: the same codes times the same codes,
    summed in another order, where each layer's rounding is a few hundredths."""
    plain = e2e_models.tiny(models, "llama")
    checkpoint = make_model.quantize_checkpoint(plain, plain.with_name(f"{plain.name}-fp8"), "fp8")
    answers = []
    for switch in ("1", "0"):
        (result,) = run_engines(
            f"fp8-{switch}", [e2e_models.job(checkpoint, "bfloat16", PROMPT)], VLLM_PLUGIN_TM=switch
        )
        answers.append(result["answers"][0]["logprobs"][0])
        if switch == "1":
            (worker,) = result["workers"]
            assert ("TMFp8LinearKernel", True, 8) in worker["layers"]
    reference = e2e_models.log_probabilities(
        AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32), PROMPT
    )
    on, off = answers
    assert distance(on, off) < 0.5 * distance(off, reference)
