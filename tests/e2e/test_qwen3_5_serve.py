# SPDX-License-Identifier: Apache-2.0
"""A real `vllm serve` of a Qwen3.5 with experts whose layers are held differently; and modules that
vLLM runs as one, but that a checkpoint holds in two ways."""

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import e2e_models
import pytest
import torch
from mixed_models import W4_G32, W8_G64, Awq, Mixture
from qwen3_5_mixtures import AWQ, KEPT

from tools import layout
from tools.server import Server

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

MOE = "qwen3_5_moe_text"
TOKENS = 24
PROMPTS = [[7, 301, 44, 12, 500, 3, 3, 99], [400 - i for i in range(70)], [11, 22, 33, 44, 55]]


@pytest.fixture(scope="module")
def checkpoint(models: Path) -> Path:
    """Without a tokenizer: prompts are numbers of tokens. All experts are asked for every token: a
    router near a tie, which bf16 turns, would be more than greedy text forgives."""
    return KEPT.write(e2e_models.tiny(models, MOE, num_experts_per_tok=8))


@pytest.fixture(scope="module")
def server(checkpoint: Path, torchvision: dict[str, str]) -> Iterator[Server]:
    """As a user starts it: compiled."""
    with Server(
        checkpoint,
        log=layout.BUILD / "e2e" / "logs" / "serve-qwen3_5.log",
        venv=Path(sys.prefix),
        settings={"VLLM_PLUGIN_TM": "1", "VLLM_CPU_KVCACHE_SPACE": "1", **torchvision},
        arguments=(
            *("--max-model-len", "256", "--max-num-seqs", "8", "--dtype", "bfloat16"),
            "--skip-tokenizer-init",
        ),
    ) as started:
        yield started


def test_greedy_text_is_the_references(server: Server, checkpoint: Path) -> None:
    """All prompts at once, so that prefills and decodes of Gated DeltaNet meet in one batch."""
    weights = KEPT.dequantized(checkpoint)
    references = (
        e2e_models.transformers_model_of(checkpoint, weights),
        e2e_models.transformers_model_of(checkpoint, weights, torch.bfloat16),
    )
    options = {"max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True}
    answer = server.complete(PROMPTS, **options)  # type: ignore[arg-type]
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    for prompt, choice in zip(PROMPTS, choices, strict=True):
        given, ours = choice["prompt_token_ids"], choice["token_ids"]
        assert (given, len(ours)) == (prompt, TOKENS)
        e2e_models.check_greedy(references, given, ours, disputed_share=1 / 3)


def test_the_log_says_what_runs_where(server: Server) -> None:
    """Of every scheme in the checkpoint one row or more; compiled as one graph."""
    log = server.log.read_text()
    assert set(re.findall(r"vllm-plugin-tm layers: (\d+) of (\d+) on TM", log)) == {("13", "34")}
    rows = re.findall(r"\d+ +TM +(\w+) +\w+ +(\w+) +(\w+)", log)
    assert {(kernel, group, scheme) for kernel, group, scheme in rows} == {
        ("TMWNA16LinearKernel", "32", "CompressedTensorsWNA16"),
        ("TMWNA16LinearKernel", "64", "CompressedTensorsWNA16"),
        ("TMWFp8A16LinearKernel", "channel", "CompressedTensorsW8A16Fp8"),
        ("TMExpertsKernel", "32", "CompressedTensorsWNA16MoEMethod"),
        ("TMExpertsKernel", "64", "CompressedTensorsWNA16MoEMethod"),
    }
    assert "CompilationMode.DYNAMO_TRACE_ONCE" in log
    assert not re.search(r"graph break|torch\._dynamo\.exc", log, flags=re.IGNORECASE)


def _halves() -> Mixture:
    """in_proj_z by other bits than in_proj_qkv."""
    rules = ((r"re:.*in_proj_qkv$", W8_G64), (r"re:.*in_proj_z$", W4_G32))
    return replace(KEPT, name="halves", rules=(*rules, *KEPT.rules))


def _half_kept() -> Mixture:
    """in_proj_z in 16 bits beside a quantized in_proj_qkv."""
    return replace(KEPT, name="half-kept", ignore=(*KEPT.ignore, r"re:.*in_proj_z$"))


def _awq(kept: str) -> Awq:
    """AWQ with `kept` in 16 bits."""
    quantized = AWQ.quantized.replace(f"{kept}|", "")
    return replace(AWQ, name=f"awq-{kept}", quantized=quantized, kept=(*AWQ.kept, kept))


Z, QKV = (f"model.layers.2.linear_attn.in_proj_{part}" for part in ("z", "qkv"))
REFUSED: list[tuple[Mixture | Awq, str]] = [
    (
        _halves(),
        f"{QKV} is held as weights int8 per group 64, activations kept (pack-quantized), and {Z} "
        "as weights int4 per group 32, activations kept (pack-quantized), but vLLM runs",
    ),
    (_half_kept(), f"{QKV} is quantized and {Z} is not, but vLLM runs them as one layer"),
    (_awq("in_proj_z"), f"{QKV} is quantized and {Z} is not, but vLLM runs them as one layer"),
    (
        # Upstream takes this name for the beginning of the whole layer's.
        _awq("in_proj_qkv"),
        f"{QKV} is held as plain weights, and {Z} as codes (qweight), but vLLM runs them as one "
        "layer, model.layers.2.linear_attn.in_proj_qkvz",
    ),
]


def test_halves_of_one_layer_that_disagree_are_refused(
    models: Path,
    run_engines: Callable[..., list[dict[str, Any]]],
    torchvision: dict[str, str],
) -> None:
    """vLLM runs both projections into Gated DeltaNet as one: both are named."""
    plain = e2e_models.tiny(models, "qwen3_5_text")
    jobs = [
        e2e_models.job(mixture.write(plain), "bfloat16", [1, 2, 3]) | {"fails": True}
        for mixture, _ in REFUSED
    ]
    results = run_engines("qwen3_5-refused", jobs, **torchvision)
    for (mixture, words), result in zip(REFUSED, results, strict=True):
        assert words in result["refused"], mixture.name
