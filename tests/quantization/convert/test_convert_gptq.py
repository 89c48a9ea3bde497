# SPDX-License-Identifier: Apache-2.0
"""Calibrated conversion: what is refused before it starts, and llm-compressor itself where an
environment has it (`build/peers/llm-compressor`, made as docs/conversion.md says)."""

import sys

import convert_cases as cases
import pytest
import torch

from tools import layout
from vllm_plugin_tm.quantization.convert import ConvertError, Options, convert

PEER = layout.BUILD / "peers" / "llm-compressor" / "bin" / "python"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a b c d e f g h " * 200)
    return path


def options(text, **changes):
    how = {"method": "gptq", "calibration": str(text), "calibration_python": sys.executable}
    return Options("w4a16", **{**how, **changes})


def test_a_missing_llm_compressor_names_the_cure(tmp_path, text):
    """The environment of these tests is vLLM's, which llm-compressor's versions do not suit."""
    with pytest.raises(ConvertError, match=r"needs llm-compressor, which .* has not.*pip install"):
        convert(cases.make(tmp_path / "src"), tmp_path / "dst", options(text))
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calibration": "/no/such/text"}, "/no/such/text: the calibration text is no file"),
        ({"calibration_python": "/no/python"}, "/no/python cannot be run"),
        ({"resume": True}, "cannot be resumed"),
    ],
)
def test_refusals(tmp_path, text, changes, words):
    with pytest.raises(ConvertError, match=words):
        convert(cases.make(tmp_path / "src"), tmp_path / "dst", options(text, **changes))


def test_what_is_there_is_not_overwritten(tmp_path, text):
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "mine").write_text("mine")
    with pytest.raises(ConvertError, match="there already and not empty"):
        convert(cases.make(tmp_path / "src"), tmp_path / "dst", options(text))


@pytest.mark.parametrize(
    ("answer", "words"),
    [("print('refused: too short'); sys.exit(1)", "^too short$"),
     ("raise OSError('broken')", "(?s)llm-compressor failed .*broken")],
)  # fmt: skip
def test_the_workers_own_words_come_through(tmp_path, text, monkeypatch, answer, words):
    from vllm_plugin_tm.quantization.convert import gptq, gptq_worker

    worker = tmp_path / "worker.py"
    worker.write_text(f"import sys\n{answer}\n")
    monkeypatch.setattr(gptq, "_MODULE", "torch")
    monkeypatch.setattr(gptq_worker, "__file__", str(worker))
    with pytest.raises(ConvertError, match=words):
        convert(cases.make(tmp_path / "src"), tmp_path / "dst", options(text))
    assert [path.name for path in tmp_path.iterdir() if "dst" in path.name] == []


@pytest.mark.slow
@pytest.mark.skipif(not PEER.exists(), reason="no environment with llm-compressor")
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_tiny_model(tmp_path, symmetric):
    """Weights of the scheme, and outputs on the calibration text nearer to the original's than
    those of rounding to nearest."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import (
        AutoModelForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    words = " ".join(f"word{i * i % 97}" for i in range(4000))
    (tmp_path / "text.txt").write_text(words)
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator([words], trainers.WordLevelTrainer(special_tokens=["<unk>"]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=len(fast), tie_word_embeddings=False,
    )  # fmt: skip
    plain = LlamaForCausalLM(config)
    plain.to(torch.bfloat16).save_pretrained(tmp_path / "src")
    fast.save_pretrained(tmp_path / "src")
    how = {"calibration_python": str(PEER), "calibration_samples": 24, "calibration_length": 128}
    wanted = options(tmp_path / "text.txt", group_size=128, symmetric=symmetric, **how)
    report = convert(tmp_path / "src", tmp_path / "gptq", wanted)
    convert(tmp_path / "src", tmp_path / "rtn", Options("w4a16", 128, symmetric=symmetric))
    assert report.layers == 14
    assert set(cases.tensors_of(tmp_path / "gptq")) == set(cases.tensors_of(tmp_path / "rtn"))
    assert cases.quantization_of(tmp_path / "gptq") == cases.quantization_of(tmp_path / "rtn")
    ids = torch.tensor([fast(words)["input_ids"][:512]])

    def logits(folder):
        with torch.no_grad():
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits

    true = logits(tmp_path / "src")
    errors = {name: float((logits(tmp_path / name) - true).norm()) for name in ("gptq", "rtn")}
    assert errors["gptq"] < errors["rtn"]
    with pytest.raises(ConvertError, match=r"has 4,000 tokens, but 99 samples of 128 need 12,672"):
        convert(tmp_path / "src", tmp_path / "short", options(
            tmp_path / "text.txt", **{**how, "calibration_samples": 99}))  # fmt: skip
