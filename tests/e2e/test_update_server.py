# SPDX-License-Identifier: Apache-2.0
"""Updates over HTTP: the example's trainer teaches a server, which refuses a wrong update."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tools import layout, make_model
from tools.process import group_members
from tools.server import Server, server_environment

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

EXAMPLE = layout.ROOT / "examples" / "update_weights.py"
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seeded Llama of two narrow layers with SmolLM2's tokenizer."""
    words = make_model.smollm2(layout.MODELS / make_model.PLAIN)
    tokenizer = AutoTokenizer.from_pretrained(words)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain")
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(plain: Path) -> Iterator[Server]:
    """As the head of the example says."""
    with Server(
        plain,
        log=layout.BUILD / "e2e" / "logs" / "serve-updates.log",
        venv=Path(sys.prefix),
        settings={
            "VLLM_PLUGIN_TM": "1",
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        },
        arguments=(
            *("--quantization", "tm_w4a16", "--weight-transfer-config"),
            '{"backend": "tm_safetensors"}',
            *("--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager"),
        ),
    ) as started:
        yield started


@pytest.fixture(scope="module")
def example() -> Any:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("update_weights", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_teaches_the_server(server: Server, plain: Path, example: Any) -> None:
    """The answer is the seed's at first and the trainer's at last; the server gets the checkpoint's
    own weights back."""
    trainer = example.Server(server.url, str(plain))
    before = trainer.complete(PROMPT)
    run = subprocess.run(
        [sys.executable, EXAMPLE, plain, "--url", server.url, "--rate", "0.01", "--steps", "10"],
        env=server_environment({}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    first, *rounds = run.stdout.splitlines()
    assert first == f"at first: {PROMPT}{before!r}"
    assert len(rounds) == 2
    assert "Atlantis" not in before
    assert "Atlantis" in rounds[-1]
    assert "Atlantis" in trainer.complete(PROMPT)
    trainer.update([plain / make_model.WEIGHTS])
    assert trainer.complete(PROMPT) == before


@pytest.mark.parametrize("wrong", ["missing", "nan"])
def test_a_wrong_update_is_refused_with_the_reason(
    server: Server, plain: Path, example: Any, tmp_path: Path, wrong: str
) -> None:
    """The server says which tensor it is, and answers as it did."""
    weights = load_file(plain / make_model.WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    if wrong == "missing":
        del weights[name]
    else:
        weights[name][3, 5] = float("nan")
    save_file(weights, tmp_path / "wrong.safetensors")
    trainer = example.Server(server.url, str(plain))
    before = trainer.complete(PROMPT)
    with pytest.raises(RuntimeError, match=rf"(?s)old ones still serve.*{name}.*gate_up_proj"):
        trainer.update([tmp_path / "wrong.safetensors"])
    assert trainer.complete(PROMPT) == before


def _engine(server: Server) -> int:
    """The process with the model, by the title that vLLM gives it."""
    titles = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in server.processes()}
    (pid,) = (pid for pid, title in titles.items() if title.startswith(b"VLLM::EngineCore"))
    return pid


def test_an_engine_killed_in_an_update_is_noticed_and_changes_no_file(
    server: Server, plain: Path, example: Any
) -> None:
    """vLLM answers neither this request nor any other, and has to be stopped. The last test of this
    server: it is gone afterwards."""
    weights = plain / make_model.WEIGHTS
    before = weights.read_bytes()
    trainer = example.Server(server.url, str(plain), seconds=5)
    trainer.post("start_weight_update")
    trainer.post("update_weights", update_info={"files": [str(weights)]})
    engine = _engine(server)
    os.kill(engine, signal.SIGSTOP)  # so that it does not finish before it is killed
    with ThreadPoolExecutor(1) as pool:
        finish = pool.submit(trainer.post, "finish_weight_update")
        time.sleep(1)
        assert not finish.done()
        os.kill(engine, signal.SIGKILL)
        with pytest.raises(TimeoutError):
            finish.result(timeout=60)
    with pytest.raises(OSError, match=r"refused|503|timed out"):
        urllib.request.urlopen(f"{server.url}/health", timeout=5)
    group = os.getpgid(server.processes()[0])
    server.stop()
    assert group_members(group) == []
    assert weights.read_bytes() == before
