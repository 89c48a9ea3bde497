# SPDX-License-Identifier: Apache-2.0
"""transformers reads what the converter writes: the same weights as the library gives."""

from dataclasses import replace

import convert_cases as cases
import pytest
import torch

from vllm_plugin_tm.quantization.convert import Options, convert
from vllm_plugin_tm.quantization.support_matrix import CHANNEL

transformers = pytest.importorskip("transformers", reason="needs transformers")

pytestmark = pytest.mark.slow

OPTIONS = (
    Options("w4a16"),
    Options("w4a16", group_size=64, symmetric=False, method="mse"),
    Options("w4a16", group_size=CHANNEL, lm_head=True),
    Options("w8a16"),
    Options("w4a8"),
    Options("w4a8", format="pack-quantized"),
    Options("w8a8"),
    Options("fp8"),
    Options("fp8-block"),
    Options("fp8-block", block_size=64, scales="ue8m0"),
    Options("w4a16", group_size=128, on_indivisible="channel"),
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tiny model of transformers' own making."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=128, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("readers") / "plain"
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: f"{o.scheme}-{o.weight_group}-{o.method}"
)
def test_transformers_holds_the_same_weights(plain, tmp_path, options):
    if options.scheme == "fp8-block":
        options = replace(options, on_indivisible="skip")
    report = convert(plain, tmp_path / "dst", options)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dst", dtype="auto")
    with torch.no_grad():  # the first forward decompresses
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    held = dict(model.named_parameters())
    weights = cases.dequantized(tmp_path / "dst")
    assert len(weights) == report.layers
    for module, weight in weights.items():
        assert torch.equal(held[f"{module}.weight"], weight.to(torch.bfloat16)), module
