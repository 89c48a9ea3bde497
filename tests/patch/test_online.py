# SPDX-License-Identifier: Apache-2.0
"""Quantizing while loading: the converter's bits in every layer, reloads, and what is refused."""

import json
import pickle
from dataclasses import replace

import pytest
import tiny_llama
import torch
from safetensors.torch import load_file, save_file

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

from transformers import AutoConfig, AutoModelForCausalLM
from vllm.model_executor.layers.linear import QKVParallelLinear

from vllm_plugin_tm import layer_table
from vllm_plugin_tm.patch import apply
from vllm_plugin_tm.quantization.convert import Options, convert
from vllm_plugin_tm.quantization.load_check import CheckpointError
from vllm_plugin_tm.quantization.online.linear import refuse_cut, whole_outputs
from vllm_plugin_tm.quantization.online.options import KEY, METHODS, OnlineError

pytestmark = pytest.mark.slow

SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
# `--quantization`, options of the user's, and the converter's for the same.
REQUESTS = {
    "w4a16": ("tm_w4a16", {}, Options("w4a16")),
    "w4a16 g64 asymmetric mse": (
        "tm_w4a16",
        {"group_size": 64, "symmetric": False, "method": "mse"},
        Options("w4a16", 64, symmetric=False, method="mse"),
    ),
    "w4a16 channel signed": (
        "tm_w4a16",
        {"group_size": "channel", "method": "signed"},
        Options("w4a16", -1, method="signed"),
    ),
    "w8a16": ("tm_w8a16", {}, Options("w8a16")),
    "w4a8": ("tm_w4a8", {"group_size": 64}, Options("w4a8", 64)),
    "w8a8": ("tm_w8a8", {}, Options("w8a8")),
    "fp8": ("tm_fp8", {}, Options("fp8")),
    "fp8 ue8m0": ("tm_fp8", {"scales": "ue8m0"}, Options("fp8", scales="ue8m0")),
    "fp8-block": (
        "tm_fp8_block",
        {"on_indivisible": "channel"},
        Options("fp8-block", on_indivisible="channel"),
    ),
    "fp8-block b32 ue8m0": (
        "tm_fp8_block",
        {"block_size": 32, "scales": "ue8m0"},
        Options("fp8-block", block_size=32, scales="ue8m0"),
    ),
}
# Two blocks of 128 each way, and a key and value projection that are half of one.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 32}
WIDE_EXPERTS = {"moe_intermediate_size": 256, "num_key_value_heads": 4}


@pytest.fixture(autouse=True)
def _patched(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # vLLM's CPU worker does the same: there is no cache to empty.
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    apply.apply()
    yield
    apply.remove()


def make(folder, architecture="llama", seed=0, **changes):
    """A seeded bf16 checkpoint of transformers' own saving."""
    torch.manual_seed(seed)
    sizes = SIZES | EXPERTS.get(architecture, {}) | changes
    config = AutoConfig.for_model(architecture, **sizes)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    return folder


def fitting(folder, name, architecture="llama", seed=0):
    """make() with sizes that a request's groups or blocks fit. Of a Llama's layers with blocks of
    128 some are fused of matrices that do not fit all."""
    if REQUESTS[name][2].weight_group < 128:
        return make(folder, architecture, seed)
    experts = WIDE_EXPERTS if architecture in EXPERTS else {}
    return make(folder, architecture, seed, **WIDE, **experts)


def online(path, method, options=None, **more):
    additional = {KEY: options} if options else {}
    return tiny_llama.load(path, quantization=method, additional_config=additional, **more)


def parameters(model):
    """All but the shapes in checkpoints, of which a fused layer keeps that of its last part."""
    return {
        name: param.data
        for name, param in model.named_parameters()
        if not name.endswith("weight_shape")
    }


def assert_equal(model, expected):
    found = parameters(model)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        *((architecture, name) for architecture in ("llama", "qwen3_moe") for name in REQUESTS),
        # With biases, and with other names of experts.
        *(
            (other, name)
            for other in ("qwen2", "mixtral")
            for name in ("w4a16", "w8a8", "fp8", "fp8-block")
        ),
    ],
)
def test_the_layers_are_those_of_the_converted_checkpoint(tmp_path, architecture, name):
    """Kernel layout, scales, zero points, all that is left unquantized: bit for bit."""
    method, options, converter = REQUESTS[name]
    plain = fitting(tmp_path / "plain", name, architecture)
    convert(plain, tmp_path / "made", converter)
    expected = parameters(tiny_llama.load(tmp_path / "made"))
    rows = layer_table.last()
    assert all(row.on_tm for row in rows if row.group_size is not None)
    assert_equal(online(plain, method, options), expected)
    assert [(r.kernel, r.on_tm, r.group_size, r.count) for r in layer_table.last()] == [
        (r.kernel, r.on_tm, r.group_size, r.count) for r in rows
    ]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_activations(tmp_path, dtype):
    """The weights take the model's type before they are quantized."""
    model = online(make(tmp_path / "plain"), "tm_w4a16", dtype=dtype)
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(3, 256, dtype=getattr(torch, dtype))
    y = layer.quant_method.apply(layer, x)
    weight = load_file(tmp_path / "plain" / "model.safetensors")[
        "model.layers.0.mlp.down_proj.weight"
    ]
    want = x.double() @ weight.double().T
    assert float((y.double() - want).norm() / want.norm()) < 0.14


def test_ignored_layers_stay_and_the_table_says_why(tmp_path):
    plain = make(tmp_path / "plain", "qwen3_moe")
    options = {"ignore": ["re:.*self_attn.*"]}
    online(plain, "tm_w4a16", options)
    rows = {(row.kernel, row.note): row.count for row in layer_table.last()}
    assert rows[("TMExpertsKernel", "")] == 2
    assert rows[("-", "ignored, as asked")] == 4
    assert rows[("-", "router or gate")] == 2


def test_targets_replace_the_default(tmp_path):
    plain = make(tmp_path / "plain")
    online(plain, "tm_w4a16", {"targets": ["re:.*down_proj$"]})
    ours = [row for row in layer_table.last() if row.on_tm]
    assert [(row.count, row.example) for row in ours] == [(2, "model.layers.0.mlp.down_proj")]


def reload(model, path, **options):
    """Upstream's own way of loading again."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    config = tiny_llama.engine_config(path, **options)
    with set_current_vllm_config(config):
        initialize_layerwise_reload(model)
        model.load_weights(iter(load_file(path / "model.safetensors").items()))
        finalize_layerwise_reload(model, config.model_config)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        *(("llama", name) for name in REQUESTS),
        *(
            ("qwen3_moe", name)
            for name in ("w4a16 g64 asymmetric mse", "w4a8", "w8a8", "fp8", "fp8-block")
        ),
    ],
)
def test_a_reload_equals_a_fresh_load(tmp_path, architecture, name):
    method, options, _ = REQUESTS[name]
    model = online(fitting(tmp_path / "0", name, architecture), method, options)
    places = {key: param.data_ptr() for key, param in model.named_parameters()}
    for seed in (1, 2):
        path = fitting(tmp_path / str(seed), name, architecture, seed)
        reload(model, path, quantization=method, additional_config={KEY: options})
        assert {key: param.data_ptr() for key, param in model.named_parameters()} == places
        held = {key: value.clone() for key, value in parameters(model).items()}
        assert_equal(online(path, method, options), held)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group_sise": 64}, r"'group_sise' \(64\), which is not known; allowed are group_size, "),
        ({"group_size": "wide"}, "group_size is 'wide'; allowed is a multiple of 8"),
        ({"group_size": True}, "group_size is True"),
        ({"group_size": 12}, "group size 12 is not allowed"),
        ({"symmetric": "no"}, "symmetric is 'no'; allowed is true or false"),
        ({"method": "gptq"}, "method is 'gptq'; allowed is rtn or signed or mse"),
        ({"method": 3}, "method is 3"),
        ({"method": "signed", "symmetric": False}, "'signed' is for symmetric weights"),
        ({"mse_weight": "square"}, "mse_weight 'square' is for method 'mse'"),
        ({"on_indivisible": "pad"}, "on_indivisible 'pad' is not known"),
        ({"ignore": "re:.*"}, "ignore is 're:.*'; allowed is a list"),
        ({"ignore": ["re:("]}, "is no regular expression"),
        ({"ignore": ["re:.*nowhere"]}, "ignore pattern 're:.*nowhere' matches no layer"),
        ({"targets": ["re:.*q_proj$"]}, "q_proj would be quantized and .*k_proj would not"),
        ({"group_size": 96}, r"input size \(128\) is no multiple of the group size \(96\)"),
        ({"block_size": 64}, "block size 64 does not go with scheme w4a16; fp8-block has blocks"),
        ({"block_size": "64"}, "block_size is '64'; allowed is 32 or 64 or 128"),
        ({"scales": "ue8m0"}, "'ue8m0' do not go with scheme w4a16; fp8, fp8-block may have"),
        ({"scales": 8}, "scales is 8; allowed is float or ue8m0"),
    ],
)
def test_wrong_options_are_refused_before_a_weight_is_read(tmp_path, options, words, monkeypatch):
    plain = make(tmp_path / "plain")
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    def must_not(*_args, **_kwargs):
        raise AssertionError("it read weights")

    monkeypatch.setattr(DefaultModelLoader, "load_weights", must_not)
    with pytest.raises(ValueError, match=words):
        online(plain, "tm_w4a16", options)


def test_options_of_another_scheme_are_refused(tmp_path):
    plain = make(tmp_path / "plain")
    with pytest.raises(ValueError, match="group size 32 does not go with scheme w8a8"):
        online(plain, "tm_w8a8", {"group_size": 32})
    with pytest.raises(ValueError, match="scheme w4a8 has no zero points"):
        online(plain, "tm_w4a8", {"symmetric": False})
    for group in (32, "channel"):
        with pytest.raises(ValueError, match=f"group size {group} does not go with scheme fp8-b"):
            online(plain, "tm_fp8_block", {"group_size": group})
    for method in ("tm_fp8", "tm_fp8_block"):
        with pytest.raises(ValueError, match=r"method 'mse' does not go with .*; allowed are rtn"):
            online(plain, method, {"method": "mse"})
        with pytest.raises(ValueError, match=r"scheme fp8.* has no zero points"):
            online(plain, method, {"symmetric": False})
        with pytest.raises(ValueError, match="scales 'e8m0' is not known; allowed are float, ue8"):
            online(plain, method, {"scales": "e8m0"})
    with pytest.raises(ValueError, match="block size 64 does not go with scheme fp8; fp8-block"):
        online(plain, "tm_fp8", {"block_size": 64})
    with pytest.raises(ValueError, match="block size 48 is not allowed; allowed are 32, 64, 128"):
        online(plain, "tm_fp8_block", {"block_size": 48})
    with pytest.raises(ValueError, match="tm_online is 'w4a16'; an object of options is allowed"):
        tiny_llama.load(plain, quantization="tm_w4a16", additional_config={KEY: "w4a16"})


def test_options_that_nothing_acts_on_are_refused(tmp_path):
    plain = make(tmp_path / "plain")
    with pytest.raises(OnlineError, match="--quantization is None; the options are for one of tm_"):
        tiny_llama.load(plain, additional_config={KEY: {"group_size": 32}})


@pytest.mark.parametrize("method", METHODS)
def test_a_quantized_checkpoint_is_refused(tmp_path, method):
    plain = make(tmp_path / "plain")
    convert(plain, tmp_path / "made", Options("w4a16"))
    with pytest.raises(Exception, match=r"quantized already \(compressed-tensors\)"):
        online(tmp_path / "made", method)


def test_indivisible_layers_are_left_or_get_channels(tmp_path):
    plain = make(tmp_path / "plain", intermediate_size=208)
    for choice, groups in (("channel", {32: 6, -1: 2}), ("skip", {32: 6})):
        online(plain, "tm_w4a16", {"on_indivisible": choice})
        rows = layer_table.last()
        assert {row.group_size: row.count for row in rows if row.on_tm} == groups
        notes = [row.note for row in rows if "no multiple of the group size" in row.note]
        assert len(notes) == (choice == "skip")


def test_layers_that_blocks_do_not_fit_are_refused_left_or_get_channels(tmp_path):
    """One of the matrices that are fused is enough; those of a single block are among them."""
    plain = make(tmp_path / "plain", **WIDE)
    words = r"layers.0.self_attn.qkv_proj: its output size \(64\) is no multiple of the block size"
    with pytest.raises(OnlineError, match=words):
        online(plain, "tm_fp8_block")
    for choice, groups in (("channel", {128: 6, -1: 2}), ("skip", {128: 6})):
        online(plain, "tm_fp8_block", {"on_indivisible": choice})
        rows = layer_table.last()
        assert {row.group_size: row.count for row in rows if row.on_tm} == groups
        notes = [row.note for row in rows if "no multiple of the block size (128)" in row.note]
        assert len(notes) == (choice == "skip")
    with pytest.raises(OnlineError, match=r"input size \(128\) is a single block"):
        online(make(tmp_path / "narrow"), "tm_fp8_block")


@pytest.mark.parametrize(
    ("inner", "words"),
    [(192, r"192 x 256: its output size \(192\) is no multiple"), (128, r"is a single block")],
)
def test_experts_that_blocks_do_not_fit_are_refused_by_name(tmp_path, inner, words):
    sizes = WIDE | WIDE_EXPERTS | {"moe_intermediate_size": inner}
    plain = make(tmp_path / "plain", "qwen3_moe", **sizes)
    with pytest.raises(OnlineError, match=rf"layers.0.mlp.experts.*, a matrix of .*{words}"):
        online(plain, "tm_fp8_block", {"on_indivisible": "channel"})


def test_a_shard_must_not_cut_a_block():
    options = Options("fp8-block")
    refuse_cut("layer", "output", 256, 128, options)
    words = r"layer: its output size \(256\) is split into parts of 64, .* block size \(128\)"
    with pytest.raises(OnlineError, match=words):
        refuse_cut("layer", "output", 256, 64, options)


def test_heads_that_ranks_share_count_once():
    """Blocks are those of the checkpoint's matrices; the layer's own sizes count every copy."""
    layer = object.__new__(QKVParallelLinear)
    layer.__dict__.update(
        total_num_heads=4, total_num_kv_heads=1, head_size=64, v_head_size=32,
        output_sizes=[256, 128, 64],
    )  # fmt: skip
    assert whole_outputs(layer, 448) == [256, 64, 32]


@pytest.mark.parametrize("name", ["fp8", "fp8-block"])
def test_fp8_layers_compute_what_their_weights_say(tmp_path, name):
    """e4m3 twice, of weights and of activations: 2**-4 of a value at most each, by which products
    of random signs differ to about 3 % in norm."""
    method, options, _ = REQUESTS[name]
    plain = fitting(tmp_path / "plain", name)
    layer = online(plain, method, options, dtype="float32").model.layers[0].mlp.down_proj
    x = torch.randn(3, layer.input_size)
    weight = load_file(plain / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    want = x.double() @ weight.double().T
    assert 1e-3 < float((layer(x)[0].double() - want).norm() / want.norm()) < 0.06


def spoilt(tmp_path, spoil):
    path = make(tmp_path / "plain")
    tensors = load_file(path / "model.safetensors")
    spoil(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_a_missing_tensor_is_refused_by_its_layer(tmp_path):
    path = spoilt(tmp_path, lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.qkv_proj: .* tensors are miss"):
        online(path, "tm_w4a16")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_their_layer(tmp_path, value):
    def spoil(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value

    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj: the weight is .* output row 3"):
        online(spoilt(tmp_path, spoil), "tm_w8a8")


def test_a_wrong_shape_is_refused_by_its_name(tmp_path):
    def spoil(tensors):
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name][:-8].clone()

    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj.weight \(torch.bfloat16"):
        online(spoilt(tmp_path, spoil), "tm_w4a16")


def test_the_switch_off_knows_no_such_method(tmp_path):
    plain = make(tmp_path / "plain")
    apply.remove()
    with pytest.raises(Exception, match="tm_w4a16"):
        online(plain, "tm_w4a16")


def test_experts_that_do_not_fit_are_refused_before_loading(tmp_path):
    plain = make(tmp_path / "plain", "qwen3_moe", moe_intermediate_size=48)
    with pytest.raises(NotImplementedError, match=r"input size \(48\) must be a multiple"):
        online(plain, "tm_w4a16", {"group_size": 32})


def test_dummy_weights_load_too(tmp_path):
    plain = make(tmp_path / "plain")
    (plain / "model.safetensors").unlink()
    online(plain, "tm_w4a16", load_format="dummy")
    assert sum(row.count for row in layer_table.last() if row.on_tm) == 8


def test_the_configs_reach_a_worker():
    """vLLM pickles its configuration for each process that it starts."""
    from vllm_plugin_tm.quantization.online.config import CLASSES

    assert [config.method for config in CLASSES] == list(METHODS)
    for config in CLASSES:
        assert type(pickle.loads(pickle.dumps(config()))) is config


def test_all_of_what_is_asked_can_be_written_as_json():
    for _, options, converter in REQUESTS.values():
        assert json.loads(json.dumps(options)) == options
        assert replace(converter)
