# SPDX-License-Identifier: Apache-2.0
"""What a conversion writes: tensors, values, configuration, for every scheme and kind of source."""

import json
from dataclasses import replace

import convert_cases as cases
import pytest
import torch
from golden_names import MODELS

from vllm_plugin_tm.quantization.convert import ConvertError, Options, convert, preview
from vllm_plugin_tm.quantization.convert.rounding import Rounding, quantize_fp8_block, quantize_int
from vllm_plugin_tm.quantization.support_matrix import CHANNEL

SCHEMES = {
    "w4a16": Options("w4a16"),
    "w4a16-g128-asymmetric": Options("w4a16", group_size=128, symmetric=False),
    "w4a16-channel": Options("w4a16", group_size=CHANNEL),
    "w4a16-signed": Options("w4a16", method="signed"),
    "w4a16-mse": Options("w4a16", method="mse"),
    "w8a16": Options("w8a16", group_size=64),
    "w8a16-asymmetric": Options("w8a16", group_size=CHANNEL, symmetric=False),
    "w4a8": Options("w4a8"),
    "w4a8-packed": Options("w4a8", group_size=128, format="pack-quantized"),
    "w8a8": Options("w8a8"),
    "fp8": Options("fp8"),
    "fp8-block": Options("fp8-block", on_indivisible="skip"),
    "fp8-ue8m0": Options("fp8", scales="ue8m0"),
    "fp8-block-32-ue8m0": Options(
        "fp8-block", block_size=32, scales="ue8m0", on_indivisible="skip"
    ),
}
# In norm, of normal weights: 4 bits lose about a tenth, 8 bits and e4m3 much less.
WITHIN = {"w4": 0.14, "w8": 0.012, "fp": 0.04}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("model", ["llama", "qwen3_5"])
def test_the_library_reads_it_and_the_rest_is_as_it_was(tmp_path, name, model):
    options = SCHEMES[name]
    source = cases.make(tmp_path / "src", model, shards=2)
    report = convert(source, tmp_path / "dst", options)
    before, after = cases.tensors_of(source), cases.tensors_of(tmp_path / "dst")
    weights = cases.dequantized(tmp_path / "dst")
    assert len(weights) == report.layers
    assert sum(w.numel() for w in weights.values()) == report.parameters
    for module, weight in weights.items():
        true = original(before, module)
        error = (weight.double() - true.double()).norm() / true.double().norm()
        assert error < WITHIN[name[:2]], (module, float(error))
    for tensor, value in before.items():
        if tensor.removesuffix(".weight") in report.kept or value.dim() < 2:
            assert torch.equal(after[tensor], value), tensor
    quantized = {n for n in after if n.rpartition(".")[0] in weights and "bias" not in n}
    split = {m.rsplit(".", 2)[0] for m in weights if ".experts." in m}
    fused = {n for n in before if n.rpartition(".")[0] in split}
    assert set(after) - quantized == set(before) - {f"{m}.weight" for m in weights} - fused


def original(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """The weights that a module had, fused experts too."""
    if f"{module}.weight" in tensors:
        return tensors[f"{module}.weight"]
    experts, expert, part = module.rsplit(".", 2)
    if part == "down_proj":
        return tensors[f"{experts}.down_proj"][int(expert)]
    both = tensors[f"{experts}.gate_up_proj"][int(expert)]
    return both.chunk(2)[0 if part == "gate_proj" else 1]


@pytest.mark.parametrize("name", SCHEMES)
def test_upstream_takes_the_configuration(tmp_path, name):
    """vLLM's own class of the configuration, and the class of the scheme it would run."""
    config_class = pytest.importorskip(
        "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors"
    ).CompressedTensorsConfig
    convert(cases.make(tmp_path / "src"), tmp_path / "dst", SCHEMES[name])
    raw = json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"]
    config = config_class.from_config(raw)
    assert "lm_head" in config.ignore
    scheme = config.target_scheme_map["Linear"]
    assert scheme["weights"].num_bits == SCHEMES[name].details.bits
    assert (scheme["input_activations"] is None) == name.startswith(("w4a16", "w8a16"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_scales_have_the_weights_type_and_codes_are_made_for_them(tmp_path, dtype):
    source = cases.make(tmp_path / "src", dtype=dtype)
    convert(source, tmp_path / "dst", Options("w4a8"))
    before, after = cases.tensors_of(source), cases.tensors_of(tmp_path / "dst")
    module = "model.layers.0.mlp.up_proj"
    codes, scale, _ = quantize_int(before[f"{module}.weight"], Rounding(4, 32), dtype)
    assert after[f"{module}.weight_scale"].dtype == dtype
    assert torch.equal(after[f"{module}.weight_scale"], scale)
    assert torch.equal(after[f"{module}.weight"], codes)


@pytest.mark.parametrize("turned", [False, True])
def test_fused_experts_are_split_as_vllm_loads_them(tmp_path, turned):
    """[E, rows, columns] as Qwen3.5 has them, [E, columns, rows] as Llama 4 does."""
    hidden, inner, experts = 128, 96, 3
    generator = torch.Generator().manual_seed(3)
    both = torch.randn(experts, 2 * inner, hidden, generator=generator).bfloat16()
    down = torch.randn(experts, hidden, inner, generator=generator).bfloat16()
    base = "model.layers.0.mlp.experts"
    tensors = {f"{base}.gate_up_proj": both, f"{base}.down_proj": down}
    if turned:
        tensors = {name: t.transpose(1, 2).contiguous() for name, t in tensors.items()}
    config = {"model_type": "any", "hidden_size": hidden, "num_hidden_layers": 1}
    source = cases.write(tmp_path / "src", tensors, config)
    convert(source, tmp_path / "dst", Options("w8a16"))
    weights = cases.dequantized(tmp_path / "dst")
    assert len(weights) == 3 * experts
    for expert in range(experts):
        gate, up = both[expert].chunk(2)
        for part, true in (("gate_proj", gate), ("up_proj", up), ("down_proj", down[expert])):
            held = weights[f"{base}.{expert}.{part}"].float()
            assert (held - true.float()).norm() / true.float().norm() < 0.01


@pytest.mark.parametrize("own", [{}, {"model_type": "gpt_oss"}])
def test_experts_that_cannot_be_told_apart_are_named_or_left(tmp_path, own):
    size = 64
    tensors = {
        "model.layers.0.mlp.experts.down_proj": torch.randn(2, size, size).bfloat16(),
        "model.layers.0.self_attn.o_proj.weight": torch.randn(size, size).bfloat16(),
    }
    config = {"model_type": "any", "hidden_size": size, **own}
    source = cases.write(tmp_path / "src", tensors, config)
    words = "gates and ups alternate" if own else "does not say which side is the hidden size"
    with pytest.raises(ConvertError, match=words):
        preview(source, tmp_path / "dst", Options("w4a16"))
    report = convert(source, tmp_path / "dst", Options("w4a16", ignore=("re:.*experts.*",)))
    assert report.layers == 1
    after = cases.tensors_of(tmp_path / "dst")
    name = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(after[name], tensors[name])
    assert "model.layers.0.mlp.experts" in cases.quantization_of(tmp_path / "dst").ignore


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("scheme", ["w4a16", "fp8-block"])
def test_fp8_blocks_are_dequantized_on_the_way(tmp_path, scale_dtype, scheme):
    """DeepSeek's layout: what is quantized is the dequantized weight, what stays becomes bf16."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"self_attn.o_proj": (256, 384), "mlp.gate": (8, 384), "mlp.up_proj": (384, 256)}
    tensors, true = {}, {}
    for module, (n, k) in shapes.items():
        name = f"model.layers.0.{module}"
        weight = torch.randn(n, k, generator=generator)
        weight[: n // 2] *= 30
        codes, scale = quantize_fp8_block(
            weight, 128, torch.float32, power_of_two=scale_dtype != torch.float32
        )
        tensors |= {f"{name}.weight": codes, f"{name}.weight_scale_inv": scale.to(scale_dtype)}
        spread = scale.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
        true[name] = codes.float() * spread
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {"model_type": "deepseek_v3", "hidden_size": 384, "quantization_config": fp8}
    source = cases.write(tmp_path / "src", tensors, config)
    convert(source, tmp_path / "dst", Options(scheme), None)
    after = cases.tensors_of(tmp_path / "dst")
    assert not [name for name in after if "scale_inv" in name]
    assert torch.equal(
        after["model.layers.0.mlp.gate.weight"], true["model.layers.0.mlp.gate"].bfloat16()
    )
    for module, held in cases.dequantized(tmp_path / "dst").items():
        error = (held.float() - true[module]).norm() / true[module].norm()
        assert error < (0.14 if scheme == "w4a16" else 0.04)
    assert cases.quantization_of(tmp_path / "dst").quant_method == "compressed-tensors"


def test_fp8_blocks_of_another_size_are_refused(tmp_path):
    fp8 = {"quant_method": "fp8", "weight_block_size": [256, 256]}
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.zeros(256, 256).bfloat16()}
    source = cases.write(tmp_path / "src", tensors, {"quantization_config": fp8})
    with pytest.raises(ConvertError, match="FP8 blocks of 256; sizes that divide 128 are read"):
        convert(source, tmp_path / "dst", Options("w4a16"))


def test_a_group_that_does_not_divide_is_an_error_or_what_was_asked(tmp_path):
    tensors = {
        "model.layers.0.mlp.up_proj.weight": torch.randn(64, 96).bfloat16(),
        "model.layers.0.mlp.down_proj.weight": torch.randn(96, 128).bfloat16(),
    }
    config = {"model_type": "llama", "hidden_size": 96, "num_hidden_layers": 1}
    source = cases.write(tmp_path / "src", tensors, config)
    options = Options("w4a16", group_size=64)
    with pytest.raises(ConvertError, match=r"up_proj: its input size \(96\) is no multiple"):
        convert(source, tmp_path / "dst", options)
    assert not (tmp_path / "dst").exists()
    report = convert(source, tmp_path / "skip", replace(options, on_indivisible="skip"))
    assert "no multiple of the group size" in report.kept["model.layers.0.mlp.up_proj"]
    report = convert(source, tmp_path / "channel", replace(options, on_indivisible="channel"))
    assert report.indivisible == ("model.layers.0.mlp.up_proj",)
    groups = cases.quantization_of(tmp_path / "channel").config_groups
    assert {str(g.weights.strategy): g.targets for g in groups.values()} == {
        "group": ["model.layers.0.mlp.down_proj"],
        "channel": ["model.layers.0.mlp.up_proj"],
    }
    assert len(cases.dequantized(tmp_path / "channel")) == 2


def test_what_vllm_runs_as_one_has_one_size_of_groups(tmp_path):
    """Experts whose down projection does not divide, and blocks that the heads of k and v miss."""
    experts = "model.layers.0.mlp.experts"
    shapes = {"gate_proj": (96, 128), "up_proj": (96, 128), "down_proj": (128, 96)}
    tensors = {
        f"{experts}.{e}.{part}.weight": torch.randn(shape).bfloat16()
        for e in range(2)
        for part, shape in shapes.items()
    }
    tensors["model.layers.0.self_attn.o_proj.weight"] = torch.randn(128, 128).bfloat16()
    source = cases.write(tmp_path / "src", tensors, {"model_type": "any", "hidden_size": 128})
    options = Options("w4a16", group_size=64, on_indivisible="channel")
    report = convert(source, tmp_path / "channel", options)
    assert set(report.indivisible) == {f"{experts}.{e}.{part}" for e in range(2) for part in shapes}
    report = convert(source, tmp_path / "skip", replace(options, on_indivisible="skip"))
    assert report.layers == 1
    assert set(report.kept) == {f"{experts}.{e}.{part}" for e in range(2) for part in shapes}
    blocks = convert(
        cases.make(tmp_path / "llama"),
        tmp_path / "blocks",
        Options("fp8-block", on_indivisible="skip"),
    )
    assert {name.rpartition(".")[2] for name in blocks.kept} >= {"q_proj", "k_proj", "v_proj"}
    assert blocks.layers == 4  # o, gate, up, down


def test_blocks_need_both_sizes(tmp_path):
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.randn(64, 128).bfloat16()}
    source = cases.write(tmp_path / "src", tensors, {"model_type": "llama"})
    with pytest.raises(ConvertError, match=r"output size \(64\) is no multiple of the block size"):
        convert(source, tmp_path / "dst", Options("fp8-block"))
    convert(source, tmp_path / "dst", Options("fp8-block", on_indivisible="channel"))
    assert cases.tensors_of(tmp_path / "dst")["model.layers.0.mlp.up_proj.weight_scale"].shape == (
        64,
        1,
    )


def test_tied_embeddings_stay_tied(tmp_path):
    source = cases.make(tmp_path / "src", "gemma3")
    convert(source, tmp_path / "dst", Options("w4a16"))
    after = cases.tensors_of(tmp_path / "dst")
    assert not [name for name in after if "lm_head" in name]
    assert "lm_head" in cases.quantization_of(tmp_path / "dst").ignore


def test_a_quantized_head_is_a_target_of_its_own(tmp_path):
    convert(cases.make(tmp_path / "src"), tmp_path / "dst", Options("w8a16", lm_head=True))
    (group,) = cases.quantization_of(tmp_path / "dst").config_groups.values()
    assert group.targets == ["Linear", "lm_head"]
    assert "lm_head.weight_packed" in cases.tensors_of(tmp_path / "dst")


def test_what_is_beside_the_weights_is_copied(tmp_path):
    source = cases.make(tmp_path / "src", shards=2)
    (source / "pytorch_model.bin").write_bytes(b"old weights")
    report = convert(source, tmp_path / "dst", Options("w4a16"))
    assert report.copied == ("modeling_own.py", "tokenizer.json")
    assert sorted(path.name for path in (tmp_path / "dst").iterdir()) == [
        "config.json", "model.safetensors", "modeling_own.py", "tokenizer.json",
    ]  # fmt: skip
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "dst" / "config.json").read_text())
    after.pop("quantization_config")
    assert after == before


@pytest.mark.parametrize("model", MODELS)
def test_shards_have_an_index_that_is_true(tmp_path, model):
    source = cases.make(tmp_path / "src", model)
    one = convert(source, tmp_path / "one", Options("w4a16"))
    many = convert(source, tmp_path / "many", Options("w4a16", shard_bytes=100_000))
    assert len(one.files) == 1
    assert len(many.files) > 3
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    whole, parts = cases.tensors_of(tmp_path / "one"), cases.tensors_of(tmp_path / "many")
    assert set(index["weight_map"]) == set(parts) == set(whole)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in parts.values())
    for name, tensor in whole.items():
        assert torch.equal(tensor.view(torch.uint8), parts[name].view(torch.uint8))
    assert set(index["weight_map"].values()) == set(many.files)


def test_a_preview_says_what_is_then_done_and_writes_nothing(tmp_path):
    source = cases.make(tmp_path / "src", "qwen3_moe")
    options = Options("w4a16", symmetric=False)
    before = preview(source, tmp_path / "dst", options)
    assert not (tmp_path / "dst").exists()
    after = convert(source, tmp_path / "dst", options)
    assert replace(after, seconds=0.0, peak_bytes=0) == before
    assert after.bytes_written == sum(t.nbytes for t in cases.tensors_of(tmp_path / "dst").values())
