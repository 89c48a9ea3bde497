# SPDX-License-Identifier: Apache-2.0
"""Tiny models on the vLLM of this environment, switch on and off. `make versions` runs this file on
every version that the package names; tools/vllm_versions.py puts the names of these tests into
README.md's table."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import e2e_models
import pytest
import torch
from safetensors.torch import load_file

from tools import layout, make_model
from tools.server import Server

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

PROMPTS = [[7, 301, 44, 12, 500, 3, 3, 99, 128, 64, 250], [5], [400 - i for i in range(70)]]
EXACT = 3e-6  # float32 sums in another order, as in test_models.py and test_moe_models.py
ROUNDED = 0.1  # two layers of 8-bit activations; a wrong layer gives more than 1


@pytest.fixture(scope="module")
def checkpoints(models: Path) -> dict[str, Path]:
    """Name -> what vLLM serves."""
    plain = e2e_models.tiny(models)
    experts = e2e_models.tiny(models, "qwen3_moe")

    def quantized(source: Path, scheme: str, **how: Any) -> Path:
        target = source.with_name(
            f"{source.name}-versions-{scheme}{'' if how.get('symmetric', True) else '-asymmetric'}"
        )
        return make_model.quantize_checkpoint(source, target, scheme, **how)

    return {
        "plain": plain,
        "w4a16": quantized(plain, "w4a16", group_size=32),
        "other": quantized(e2e_models.tiny(models, seed=1), "w4a16", group_size=32),
        "experts": quantized(experts, "w4a16", group_size=32, symmetric=False),
        "rounded experts": quantized(experts, "w8a8"),
        "w8a8": quantized(plain, "w8a8"),
    }


def _job(checkpoint: Path, **more: Any) -> dict[str, Any]:
    job = e2e_models.job(checkpoint, "float32", [])
    return job | {"prompts": PROMPTS, **more}


@pytest.fixture(scope="module")
def on(checkpoints: dict[str, Path], run_engines: Callable[..., Any]) -> dict[str, Any]:
    """The engines with the switch on, in one process."""
    jobs = {
        "w4a16": _job(checkpoints["w4a16"], reloads=[str(checkpoints["other"])]),
        "experts": _job(checkpoints["experts"]),
        "rounded experts": _job(checkpoints["rounded experts"]),
        "w8a8": _job(checkpoints["w8a8"]),
        "online": _job(checkpoints["plain"]),
    }
    jobs["online"]["engine"]["quantization"] = "tm_w4a16"
    return dict(zip(jobs, run_engines("versions-on", list(jobs.values())), strict=True))


@pytest.fixture(scope="module")
def off(checkpoints: dict[str, Path], run_engines: Callable[..., Any]) -> dict[str, Any]:
    """Those that vLLM can run without the plugin on every processor."""
    jobs = {name: _job(checkpoints[name], workers=False) for name in ("plain", "w8a8")}
    answers = run_engines("versions-off", list(jobs.values()), VLLM_PLUGIN_TM="0")
    return dict(zip(jobs, answers, strict=True))


def _reference(tensors: dict[str, torch.Tensor], checkpoint: Path) -> torch.Tensor:
    """transformers' log-probabilities with these weights, after every token of the prompts."""
    model = e2e_models.transformers_model_of(checkpoint, tensors)
    return torch.cat([e2e_models.log_probabilities(model, prompt) for prompt in PROMPTS])


def _distance(result: dict[str, Any], checkpoint: Path, answer: int = 0) -> float:
    """From transformers with the checkpoint's weights, in norm."""
    want = _reference(e2e_models.dequantized(checkpoint), checkpoint)
    got = torch.cat(result["answers"][answer]["logprobs"])
    return float((got - want).norm() / want.norm())


def _on_tm(result: dict[str, Any]) -> int:
    """How many layers ran on the plugin's kernels."""
    (worker,) = result["workers"]
    assert worker["patches"]
    assert not [patch for patch in worker["patches"] if "applied=True" not in patch]
    return sum(count for _, on_tm, count in worker["layers"] if on_tm)


def test_dense_w4a16(on: dict[str, Any], checkpoints: dict[str, Path]) -> None:
    assert _distance(on["w4a16"], checkpoints["w4a16"]) <= EXACT
    assert _on_tm(on["w4a16"]) == 2 * 4


def test_reload(on: dict[str, Any], checkpoints: dict[str, Path]) -> None:
    """reload_weights of a running engine."""
    assert _distance(on["w4a16"], checkpoints["other"], answer=1) <= EXACT


def test_experts_w4a16(on: dict[str, Any], checkpoints: dict[str, Path]) -> None:
    assert _distance(on["experts"], checkpoints["experts"]) <= EXACT
    assert _on_tm(on["experts"]) == 2 * 3


def test_experts_w8a8(on: dict[str, Any], checkpoints: dict[str, Path]) -> None:
    assert EXACT < _distance(on["rounded experts"], checkpoints["rounded experts"]) < ROUNDED
    assert _on_tm(on["rounded experts"]) == 2 * 3


def test_w8a8(on: dict[str, Any], checkpoints: dict[str, Path]) -> None:
    assert EXACT < _distance(on["w8a8"], checkpoints["w8a8"]) < ROUNDED
    assert _on_tm(on["w8a8"]) == 2 * 4


def test_quantized_while_loading(on: dict[str, Any], checkpoints: dict[str, Path]) -> None:
    """The same codes and scales as the converter's."""
    assert _on_tm(on["online"]) == 2 * 4
    assert _distance(on["online"], checkpoints["w4a16"]) <= EXACT


def test_switched_off(off: dict[str, Any], checkpoints: dict[str, Path]) -> None:
    """vLLM alone, and no word of the plugin in its log."""
    plain = checkpoints["plain"]
    tensors = {k: v.float() for k, v in load_file(plain / make_model.WEIGHTS).items()}
    want = _reference(tensors, checkpoints["w4a16"])
    got = torch.cat(off["plain"]["answers"][0]["logprobs"])
    assert float((got - want).norm() / want.norm()) <= EXACT
    assert EXACT < _distance(off["w8a8"], checkpoints["w8a8"]) < ROUNDED
    log = (layout.BUILD / "e2e" / "logs" / "versions-off.log").read_text()
    assert not re.search(r"vllm-plugin-tm|TMInt8|layers: ", log)


def test_server(smollm2_w4a16: Path) -> None:
    """`VLLM_PLUGIN_TM=1 vllm serve`, with an API server, an engine and a worker, over HTTP."""
    with Server(
        smollm2_w4a16,
        log=layout.BUILD / "e2e" / "logs" / "versions-server.log",
        settings={"VLLM_PLUGIN_TM": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
        arguments=("--max-model-len", "256", "--dtype", "bfloat16", "--enforce-eager"),
    ) as server:
        answer = server.complete("The capital of France is", max_tokens=8)
    assert "Paris" in answer["choices"][0]["text"]
    log = server.log.read_text()
    assert "vllm-plugin-tm layers: 120 of 122 on TM kernels" in log
