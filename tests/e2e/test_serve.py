# SPDX-License-Identifier: Apache-2.0
"""A real `vllm serve` of a real model: answers, log, compilation, and greedy text against
transformers with the dequantized weights."""

import re
from pathlib import Path
from typing import Any

import e2e_models
import pytest
import torch

from tools import layout
from tools.console import ToolError
from tools.server import Server
from vllm_plugin_tm.kernels import ops

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
    for word in ("TMWNA16LinearKernel", " 32 ", "CompressedTensorsWNA16", "layers.0."):
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


def test_switched_off_the_checkpoint_is_vllms(request: pytest.FixtureRequest) -> None:
    """The same checkpoint without the plugin: vLLM's kernel answers as well, and no word of the
    plugin is in the log. Where vLLM's library for the processor lacks that kernel, the warm-up or,
    without one, the first request fails, and the log has vLLM's reason."""

    def answer() -> str:
        server: Server = request.getfixturevalue("server_off")
        return server.complete(PROMPTS[0], max_tokens=8)["choices"][0]["text"]

    if "avx512" in ops.cpu_isas():
        assert "Paris" in answer()
    else:
        with pytest.raises(ToolError, match=r"the server (ended|refused|at .* did not answer)"):
            answer()
    log = (layout.BUILD / "e2e" / "logs" / "serve-off.log").read_text()
    assert ("'_C' object has no attribute 'cpu_gemm_wna16'" in log) == (
        "avx512" not in ops.cpu_isas()
    )
    assert "layers:" not in log
    assert "TMWNA16LinearKernel" not in log
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
    """64 tokens, or differences that bf16 cannot tell apart: see e2e_models.check_greedy."""
    given, ours = _generated(server_on, prompt)
    assert len(ours) == TOKENS
    e2e_models.check_greedy(references, given, ours)
