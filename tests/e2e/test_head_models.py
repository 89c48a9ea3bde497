# SPDX-License-Identifier: Apache-2.0
"""Models whose output head is quantized while loading, in vLLM, against transformers with that head
dequantized."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import e2e_models
import pytest
import torch
from safetensors.torch import load_file, save_file

from tools import make_model

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

PROMPTS = [[7, 301, 44, 12, 500, 3, 3, 99, 128, 64, 250], [5], [400 - i for i in range(70)]]
HEAD = {"additional_config": {"tm_online": {"lm_head": "w8a16"}}}
# name -> whether the head is tied, whether the layers have 4 bits, compiled
MODELS = {
    "bf16": (False, False, False),
    "bf16 tied": (True, False, False),
    "bf16 tied compiled": (True, False, True),
    "w4a16": (False, True, False),
    "w4a16 tied": (True, True, False),
}


def checkpoint(models: Path, name: str) -> Path:
    """What vLLM serves: a head of 16 bits."""
    tied, quantized, _ = MODELS[name]
    plain = e2e_models.tiny(models, tie_word_embeddings=tied)
    return e2e_models.quantized(plain, 32) if quantized else plain


def reference(models: Path, name: str, folder: Path, scale_factor: float = 1.0) -> Path:
    """The same model as real numbers, with a head of its own: what the converter makes of it."""
    made = checkpoint(models, name)
    quantized = MODELS[name][1]
    weights = made / make_model.WEIGHTS
    state = e2e_models.dequantized(made) if quantized else load_file(weights)
    head = state.get("lm_head.weight", state["model.embed_tokens.weight"]).bfloat16()
    source = folder / "source"
    source.mkdir(parents=True)
    config = json.loads((made / "config.json").read_text())
    config.pop("quantization_config", None)
    config["tie_word_embeddings"] = False
    for target in (source, folder):
        (target / "config.json").write_text(json.dumps(config))
    save_file({"lm_head.weight": head}, source / make_model.WEIGHTS, metadata={"format": "pt"})
    packed = folder / "packed"
    make_model.quantize_checkpoint(source, packed, "w8a16", targets=("lm_head",))
    made_head = e2e_models.dequantized(packed, scale_factor)["lm_head.weight"]
    assert not torch.equal(made_head, head.float())
    state = {key: value.float() for key, value in state.items()} | {"lm_head.weight": made_head}
    save_file(state, folder / make_model.WEIGHTS, metadata={"format": "pt"})
    return folder


def answers(folder: Path) -> torch.Tensor:
    """transformers' log-probabilities in float32 after every token of the prompts."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return torch.cat([e2e_models.log_probabilities(model, prompt) for prompt in PROMPTS])


@pytest.fixture(scope="module")
def results(models: Path, run_engines: Callable[..., list[dict[str, Any]]]) -> dict[str, Any]:
    """All models, one after the other, in one process of vLLM."""
    jobs = []
    for name, (_, _, compiled) in MODELS.items():
        job = e2e_models.job(checkpoint(models, name), "float32", [])
        jobs.append(job | {"prompts": PROMPTS})
        job["engine"].update(HEAD, enforce_eager=not compiled)
    return dict(zip(MODELS, run_engines("heads", jobs), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities(
    results: dict[str, Any], models: Path, tmp_path: Path, name: str
) -> None:
    """float32: as in test_models.py, a few units of 2**-24; a head's scale off by 1 % is seen."""
    want = answers(reference(models, name, tmp_path / "right"))
    got = torch.cat(results[name]["answers"][0]["logprobs"])
    assert got.shape == want.shape
    bound = 2e-6
    # Row 0 sees itself alone: what is off in later rows only is not the head's doing.
    rows = [round(_distance(*pair) / bound, 2) for pair in zip(got, want, strict=True)]
    assert _distance(got, want) <= bound, f"in units of the bound, by row: {rows}"
    wrong = answers(reference(models, name, tmp_path / "wrong", 1.01))
    assert _distance(got, wrong) > 100 * bound


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_the_heads_ran_on_our_kernel(results: dict[str, Any]) -> None:
    """The head alone where the layers have 16 bits, a row of its own beside those of 4 bits."""
    for name, result in results.items():
        (worker,) = result["workers"]
        ours = sorted(row[2] for row in worker["layers"] if row[1])
        assert ours == ([1, 8] if MODELS[name][1] else [1]), name
