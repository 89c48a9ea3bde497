# SPDX-License-Identifier: Apache-2.0
"""The look-alike checkpoints: they are what their configs say, and the same every time."""

import json
import re

import pytest

pytest.importorskip("compressed_tensors")
pytest.importorskip("tokenizers")
import checkpoint_formats as formats
import look_alikes
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from look_alike_models import LOOK_ALIKES
from safetensors.torch import load_file


def rng():
    return torch.Generator().manual_seed(1)


def test_writing_twice_gives_the_same_bytes(tmp_path):
    model = LOOK_ALIKES[2]
    first = look_alikes.write(model, tmp_path / "a")
    second = look_alikes.write(model, tmp_path / "b")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_the_hub_finds_it_by_its_name(tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    model = LOOK_ALIKES[0]
    folder = look_alikes.write(model, tmp_path)
    found = huggingface_hub.snapshot_download(
        model.name, cache_dir=tmp_path / "hub", local_files_only=True
    )
    assert found == str(folder)


@pytest.mark.parametrize("symmetric", [True, False])
def test_w4a16_unpacks_to_what_the_config_says(symmetric):
    stored = formats.ct_w4a16(32, symmetric)
    tensors = stored.layer(48, 96, rng())
    codes = unpack_from_int32(tensors["weight_packed"], 4, torch.Size((48, 96)))
    assert (int(codes.min()), int(codes.max())) == (-8, 7)
    assert tensors["weight_scale"].shape == (48, 3)
    assert ("weight_zero_point" in tensors) is not symmetric
    if not symmetric:
        assert tensors["weight_zero_point"].shape == (6, 3)
    config = dict(stored.config)
    weights = QuantizationConfig.model_validate(config).config_groups["group_0"].weights
    assert (weights.num_bits, weights.group_size, weights.symmetric) == (4, 32, symmetric)


def test_the_weights_of_every_int4_format_have_the_intended_spread():
    """A scale that is off by the number of codes would make a model of noise."""
    for stored in (formats.ct_w4a16(32, True), formats.gptq(32)):
        tensors = stored.layer(256, 256, rng())
        scale = tensors.get("weight_scale", tensors.get("scales")).double()
        spread = formats.CODE_STD[4] * scale.square().mean().sqrt()
        assert 0.9 < float(spread) / formats.WEIGHT_STD < 1.2


def test_awq_order_is_undone_by_its_inverse():
    codes = formats._codes(4, (8, 16), rng())
    packed = formats._awq_pack(codes)
    stored = unpack_from_int32(packed, 4, torch.Size((8, 16))).view(8, 2, 8)
    inverse = torch.tensor(formats.AWQ_ORDER).argsort()
    assert torch.equal(stored[:, :, inverse].reshape(8, 16), codes)


def test_layers_left_out_are_stored_in_bf16(tmp_path):
    model = next(m for m in LOOK_ALIKES if m.unquantized)
    folder = look_alikes.write(model, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    packed = {name for name in tensors if name.endswith("weight_packed")}
    assert packed
    assert not any(re.match(model.unquantized, name) for name in packed)
    assert f"re:{model.unquantized}" in config["ignore"]


def test_every_quantized_model_has_every_layer():
    """No name of a fused projection is forgotten: q, k, v, o and gate, up, down of each layer."""
    for model in LOOK_ALIKES:
        if model.build is not look_alikes.decoder:
            continue
        names = {name.rpartition(".")[0] for name in model.build(model, rng())}
        for index in range(model.shape.layers):
            for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
                assert f"model.layers.{index}.self_attn.{part}" in names
