# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M with 8-bit activations and weights: every layer on what a real prompt feeds it, the
whole model's perplexity beside upstream's, and greedy text of W8A16.

With activations rounded to 8 bits this model is chaotic: noise of 1e-6 before a rounding moves
log-probabilities by 0.3. So layers are judged one by one, and the whole by its perplexity.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import e2e_models
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams

from tools import layout, make_model

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

FORMATS: dict[str, dict[str, Any]] = {
    "w8a8": {"scheme": "w8a8"},
    "w4a8-bytes": {"scheme": "w4a8", "group_size": 32},
    "w4a8-packed": {"scheme": "w4a8", "group_size": 64, "format": "pack-quantized"},
    "w8a16": {"scheme": "w8a16", "group_size": 32},
}
SCHEMES = {
    "w8a8": "CompressedTensorsW8A8Int8",
    "w4a8-bytes": "CompressedTensorsW4A8Int",
    "w4a8-packed": "CompressedTensorsWNA8Int",
    "w8a16": "CompressedTensorsWNA16",
}
PROMPT = "The capital of France is Paris. Water boils at 100 degrees Celsius, and freezes at"
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@pytest.fixture(scope="module")
def checkpoints() -> dict[str, Path]:
    """SmolLM2 in every format."""
    plain = make_model.smollm2(layout.MODELS / make_model.PLAIN)
    return {
        name: make_model.quantize_checkpoint(plain, layout.MODELS / f"smollm2-135m-{name}", **how)
        for name, how in FORMATS.items()
    }


@pytest.fixture(scope="module")
def prompts(checkpoints: dict[str, Path]) -> dict[str, list[int]]:
    """A real prompt, and a text long enough for a perplexity (the README's own words)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoints["w8a8"])
    text = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    return {"prompt": tokenizer(PROMPT).input_ids, "text": tokenizer(text).input_ids[:1000]}


def _engine(checkpoint: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(checkpoint),
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 4,
        "max_logprobs": -1,
        "kv_cache_memory_bytes": 2**26,
        "enable_prefix_caching": False,
    } | changes


@pytest.fixture(scope="module")
def results(
    checkpoints: dict[str, Path],
    prompts: dict[str, list[int]],
    run_engines: Callable[..., list[dict[str, Any]]],
) -> dict[str, Any]:
    """Every format once: what its layers saw and made of it, and the log-likelihood of the text."""
    jobs = [
        {
            "engine": _engine(checkpoint),
            "prompts": [prompts["prompt"]],
            "tokens": 64 if name == "w8a16" else 1,
            "layers": True,
            "likelihood": prompts["text"],
            "workers": True,
        }
        for name, checkpoint in checkpoints.items()
    ]
    return dict(zip(checkpoints, run_engines("int8-models", jobs), strict=True))


@pytest.mark.parametrize("name", FORMATS)
def test_every_layer_ran_on_our_kernel(results: dict[str, Any], name: str) -> None:
    """Four linears, fused ones among them, in each of 30 layers."""
    (worker,) = results[name]["workers"]
    assert sum(count for _, on_tm, count in worker["layers"] if on_tm) == 4 * 30
    assert SCHEMES[name] in worker["schemes"]


@pytest.mark.parametrize("name", FORMATS)
def test_layers_on_a_real_prompt(
    results: dict[str, Any], checkpoints: dict[str, Path], name: str
) -> None:
    """Each layer's output against the compressed-tensors library's own fake quantization of its
    input, times the dequantized weights in float64.

    The output is rounded to bf16 once: 2**-9 at most, 0.3 of that on average. A code that is off by
    one, where a quotient lies at a tie, is 1/127 of one input's share. A scale off by 1 %: 0.01.
    """
    weights = e2e_models.dequantized(checkpoints[name])
    layers = results[name]["layers"]
    assert len(layers) == 4 * 30
    for layer, (x, y) in layers.items():
        parent, _, last = layer.rpartition(".")
        parts = [f"{parent}.{part}.weight" for part in FUSED.get(last, (last,))]
        weight = torch.cat([weights[part] for part in parts]).double()
        want = _rounded(x, FORMATS[name]).double() @ weight.T
        error = float((y.double() - want).norm() / want.norm())
        assert error < 3e-3, f"{layer}: {error}"


def _rounded(x: torch.Tensor, form: dict[str, Any]) -> torch.Tensor:
    x = x.float()
    if not form["scheme"].endswith("a8"):
        return x
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    scale, zero_point = calculate_qparams(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), args)
    return fake_quantize(x, scale, zero_point, args)


def test_perplexity_of_w8a8_is_upstreams(
    results: dict[str, Any],
    checkpoints: dict[str, Path],
    prompts: dict[str, list[int]],
    run_engines: Callable[..., list[dict[str, Any]]],
) -> None:
    """No worse than oneDNN's: the noise of 0.3 a token is 0.01 over a thousand tokens."""
    job = {"engine": _engine(checkpoints["w8a8"]), "prompts": [prompts["prompt"]]}
    job["likelihood"] = prompts["text"]
    (off,) = run_engines("int8-models-off", [job], VLLM_PLUGIN_TM="0")
    ours, theirs = (-r["likelihood"].mean() for r in (results["w8a8"], off))
    assert 0.5 < theirs < 8, "a language model's, in nats per token"
    assert ours < theirs + 0.03
    # The weights lie on a 4-bit grid of groups of 32: those formats keep them, groups of 64 do not.
    for name, loss in {"w8a16": 0.03, "w4a8-bytes": 0.6, "w4a8-packed": 0.6}.items():
        assert -results[name]["likelihood"].mean() < theirs + loss, name


def test_greedy_text_of_w8a16_is_the_references(
    results: dict[str, Any], checkpoints: dict[str, Path], prompts: dict[str, list[int]]
) -> None:
    """As for W4A16: 64 tokens, or differences that bf16 cannot tell apart."""
    references = (
        e2e_models.transformers_model(checkpoints["w8a16"]),
        e2e_models.transformers_model(checkpoints["w8a16"], torch.bfloat16),
    )
    (ours,) = results["w8a16"]["answers"][0]["tokens"]
    assert len(ours) == 64
    e2e_models.check_greedy(references, prompts["prompt"], ours)


def test_the_checkpoints_are_what_their_names_say(checkpoints: dict[str, Path]) -> None:
    """A guard for the tests above: bits and activations as vLLM will read them."""
    for name, path in checkpoints.items():
        (group,) = json.loads((path / "config.json").read_text())["quantization_config"][
            "config_groups"
        ].values()
        assert group["weights"]["num_bits"] == (8 if name.startswith("w8") else 4)
        assert bool(group["input_activations"]) == ("a8" in name)
