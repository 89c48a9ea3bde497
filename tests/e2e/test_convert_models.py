# SPDX-License-Identifier: Apache-2.0
"""vLLM reads what the converter writes: unmodified where it has a kernel, and with a quantized
output head on ours."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import e2e_models
import pytest
import torch
from transformers import AutoModelForCausalLM

from tools import make_model

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

PROMPT = [7, 301, 44, 12, 500, 3, 3, 99, 128, 64, 250]


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_upstream_serves_them_unmodified(
    models: Path, run_engines: Callable[..., list[dict[str, Any]]]
) -> None:
    """W8A8 by oneDNN and FP8 by torch, with the switch off. Their activations are rounded to 8
    bits, which the reference's are not: each layer is off by about a hundredth (three for e4m3),
    and a wrong scale or a wrong order of the output would be off by all."""
    plain = e2e_models.tiny(models, "llama")
    schemes = {"w8a8": 0.1, "fp8": 0.2}
    made = [
        make_model.quantize_checkpoint(plain, plain.with_name(f"{plain.name}-{scheme}"), scheme)
        for scheme in schemes
    ]
    jobs = [e2e_models.job(checkpoint, "bfloat16", PROMPT) for checkpoint in made]
    results = run_engines("convert-off", jobs, VLLM_PLUGIN_TM="0")
    reference = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    want = e2e_models.log_probabilities(reference, PROMPT)
    for (scheme, bound), result in zip(schemes.items(), results, strict=True):
        (got,) = result["answers"][0]["logprobs"]
        assert _distance(got, want) < bound, scheme


def test_a_quantized_head_runs_on_our_kernel(
    models: Path, run_engines: Callable[..., list[dict[str, Any]]]
) -> None:
    plain = e2e_models.tiny(models, "llama")
    target = plain.with_name(f"{plain.name}-w8a16-head")
    checkpoint = make_model.quantize_checkpoint(plain, target, "w8a16", lm_head=True)
    (result,) = run_engines("convert-head", [e2e_models.job(checkpoint, "float32", PROMPT)])
    (worker,) = result["workers"]
    assert [row for row in worker["layers"] if row[1]] == [("TMWNA16LinearKernel", True, 9)]
    want = e2e_models.log_probabilities(e2e_models.transformers_model(checkpoint), PROMPT)
    (got,) = result["answers"][0]["logprobs"]
    assert _distance(got, want) < 2e-6  # as in test_models: float32 sums in another order
