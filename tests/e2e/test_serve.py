# SPDX-License-Identifier: Apache-2.0
"""A real `vllm serve` of a real model: answers, log, compilation, and greedy text against
transformers with the dequantized weights."""

import re
from pathlib import Path
from typing import Any

import e2e_models
import pytest
import torch

from tools.server import Server

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

TOKENS = 64
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at a lower temperature on a mountain because",
    "1, 2, 3, 4, 5,",
)


def test_answers_and_says_what_runs_where(server_on: Server) -> None:
    """The answer is right, and the log has the table with every layer of the model's 30."""
    answer = server_on.complete(PROMPTS[0], max_tokens=8)
    assert "Paris" in answer["choices"][0]["text"]
    log = server_on.log.read_text()
    tables = re.findall(r"vllm-plugin-tm layers: (\d+) of (\d+) on TM kernels", log)
    assert len(set(tables)) == 1, "one worker, one table"
    assert int(tables[0][0]) == 4 * 30
    (row,) = re.findall(r"120 +TM +.*", log)
    for word in ("TMW4A16LinearKernel", " 32 ", "CompressedTensorsWNA16", "layers.0."):
        assert word in row
    assert "Unknown vLLM environment variable" not in log


def test_compiled_without_a_graph_break(server_on: Server) -> None:
    """On a CPU vLLM traces the model once, as one graph, or fails: tracing was on and it went
    through."""
    log = server_on.log.read_text()
    assert "CompilationMode.DYNAMO_TRACE_ONCE" in log
    assert "enforce_eager=False" in log
    assert not re.search(r"graph break|torch\._dynamo\.exc", log, flags=re.IGNORECASE)


def test_serves_several_at_once(server_on: Server) -> None:
    """Batched prompts get the answers that they get alone: the number of rows changes nothing that
    a greedy choice depends on here."""
    alone = [server_on.complete(prompt, max_tokens=8) for prompt in PROMPTS]
    together = server_on.complete(list(PROMPTS), max_tokens=8)
    texts = [choice["text"] for choice in sorted(together["choices"], key=lambda c: c["index"])]
    assert texts == [answer["choices"][0]["text"] for answer in alone]


def test_switched_off_upstream_answers(server_off: Server) -> None:
    """The same checkpoint without us: right as well, and no word of ours in the log."""
    answer = server_off.complete(PROMPTS[0], max_tokens=8)
    assert "Paris" in answer["choices"][0]["text"]
    log = server_off.log.read_text()
    assert "layers:" not in log
    assert "TMW4A16LinearKernel" not in log
    assert "CPUWNA16LinearKernel" in log


@pytest.fixture(scope="module")
def references(smollm2_w4a16: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    """transformers with the dequantized weights: exact ones in float32, and rounded to bf16."""
    return (
        e2e_models.transformers_model(smollm2_w4a16),
        e2e_models.transformers_model(smollm2_w4a16, torch.bfloat16),
    )


def _generated(server: Server, prompt: str) -> tuple[list[int], list[int]]:
    """The prompt's tokens and the greedy ones after it."""
    options: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True, "return_token_ids": True}
    (choice,) = server.complete(prompt, **options)["choices"]
    return choice["prompt_token_ids"], choice["token_ids"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_the_references(
    server_on: Server, references: tuple[torch.nn.Module, torch.nn.Module], prompt: str
) -> None:
    """64 tokens, each checked with the tokens before it given (so one early tie hides nothing).

    Where our token is not the reference's first choice, bf16 must be unable to tell the two apart:
    the float32 reference's gap between them is at most twice what bf16 does to a logit there. That
    is measured: the largest difference between the bf16 and the float32 reference over the ten
    likeliest tokens, and at least one unit of bf16 in the last place of the logit.
    """
    given, ours = _generated(server_on, prompt)
    assert len(ours) == TOKENS
    tokens = torch.tensor([given + ours[:-1]])
    with torch.no_grad():
        exact, rounded = (model(tokens).logits[0, len(given) - 1 :].float() for model in references)
    disputed = 0
    for place, token in enumerate(ours):
        best = int(exact[place].argmax())
        if token == best:
            continue
        disputed += 1
        likely = exact[place].topk(10).indices
        unit = 2.0 ** (exact[place, best].abs().log2().floor().item() - 7)
        noise = max(unit, float((rounded[place] - exact[place])[likely].abs().max()))
        gap = float(exact[place, best] - exact[place, token])
        assert gap <= 2 * noise, f"token {place}: {token}, not {best}; gap {gap}, noise {noise}"
    # Text is mostly not on a knife's edge; a broken layer would put every other token there.
    assert disputed <= TOKENS // 8
