# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of every scheme through vLLM's loader: what loads, what is refused by name, and that
a reload equals a fresh load."""

import pytest
import tiny_llama
import torch

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

from vllm_plugin_tm import envs, layer_table
from vllm_plugin_tm.patch import apply
from vllm_plugin_tm.quantization.load_check import CheckpointError

pytestmark = pytest.mark.slow

ATTENTION = "model.layers.1.self_attn"
A8 = tiny_llama.int8_activations
W8A8 = {"bits": 8, "packed": False, "group": -1}

# name -> (options of the checkpoint, activations, expected scheme, kernel, group, note)
FORMATS = {
    "w4a16": ({"symmetric": False}, None, "WNA16", "TMWNA16LinearKernel", 32, ""),
    "w2a16": ({"bits": 2}, None, "WNA16", "TMWNA16LinearKernel", 32, ""),
    "w8a16": (
        {"bits": 8, "symmetric": False, "group": 64},
        None,
        "WNA16",
        "TMWNA16LinearKernel",
        64,
        "",
    ),
    "w4a8 packed": (
        {"symmetric": False},
        A8(),
        "WNA8Int",
        "TMWNA16LinearKernel",
        32,
        "int8 activations, per token",
    ),
    "w8a8 packed": (
        {"bits": 8, "group": -1},
        A8(),
        "WNA8Int",
        "TMWNA16LinearKernel",
        -1,
        "int8 activations, per token",
    ),
    "w4a8": (
        {"packed": False},
        A8(),
        "W4A8Int",
        "TMW4A8IntLinearKernel",
        32,
        "int8 activations, per token",
    ),
    "w8a8": (
        W8A8,
        A8(),
        "W8A8Int8",
        "TMInt8ScaledMMLinearKernel",
        -1,
        "int8 activations, per token",
    ),
    "w8a8 asymmetric": (
        W8A8,
        A8(symmetric=False),
        "W8A8Int8",
        "TMInt8ScaledMMLinearKernel",
        -1,
        "int8 activations, per token, with zero point",
    ),
    "w8a8 static tensor": (
        W8A8 | {"static": "symmetric", "tensor": True},
        A8("symmetric"),
        "W8A8Int8",
        "TMInt8ScaledMMLinearKernel",
        -1,
        "int8 activations, static",
    ),
    "w8a8 static asymmetric": (
        W8A8 | {"static": "asymmetric"},
        A8("asymmetric"),
        "W8A8Int8",
        "TMInt8ScaledMMLinearKernel",
        -1,
        "int8 activations, static, with zero point",
    ),
}


@pytest.fixture(autouse=True)
def _patched(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # vLLM's CPU worker does the same: there is no cache to empty.
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    apply.apply()
    yield
    apply.remove()


def write(path, name, spoil=None, seed=0):
    """A checkpoint of this format; its tensors."""
    options, activations = FORMATS[name][:2]
    state = tiny_llama.tensors(**options, seed=seed)
    if spoil is not None:
        spoil(state)
    saved = {key: value for key, value in options.items() if key != "static"}
    tiny_llama.save(path, state, activations=activations, **saved)
    return state


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("load", [{}, {"dtype": "float32"}, {"load_format": "dummy"}])
def test_every_format_loads_and_the_table_shows_it(tmp_path, name, load):
    write(tmp_path, name)
    model = tiny_llama.load(tmp_path, **load)
    _, _, scheme, kernel, group, note = FORMATS[name]
    ours, rest = layer_table.last()
    assert (ours.scheme, ours.kernel) == (f"CompressedTensors{scheme}", kernel)
    assert (ours.on_tm, ours.count, ours.group_size, ours.note) == (True, 8, group, note)
    assert ours.isa == ops.get_isa()
    assert (rest.count, rest.on_tm) == (2, False)
    layer = model.model.layers[0].mlp.down_proj
    y = layer.quant_method.apply(layer, torch.randn(3, 256, dtype=model.lm_head.weight.dtype))
    assert y.shape == (3, 128)
    assert bool(y.isfinite().all())


def test_the_opt_in_mode_is_named_for_each_layer(tmp_path, monkeypatch):
    monkeypatch.setenv(envs.INT8_ACTIVATIONS.name, "1")
    write(tmp_path, "w4a16")
    tiny_llama.load(tmp_path)
    assert layer_table.last()[0].note.endswith(f"{envs.INT8_ACTIVATIONS.name}=1")


def drop(name):
    def spoil(state):
        del state[f"{ATTENTION}.{name}"]

    return spoil


def drop_all(leaf):
    def spoil(state):
        for part in "qkv":
            del state[f"{ATTENTION}.{part}_proj.{leaf}"]

    return spoil


def put(name, value):
    def spoil(state):
        key = f"{ATTENTION}.{name}"
        state[key] = value(state[key]) if callable(value) else value

    return spoil


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("w8a8", drop("k_proj.weight"), ["missing", "k_proj.weight (layer"]),
        ("w8a8", drop("v_proj.weight_scale"), ["missing", "v_proj.weight_scale"]),
        ("w8a8 static tensor", drop("k_proj.weight_scale"), ["missing", "k_proj.weight_scale"]),
        ("w8a8 static tensor", drop("o_proj.weight_scale"), ["missing", "o_proj.weight_scale"]),
        ("w8a8 static tensor", drop("o_proj.input_scale"), ["missing", "o_proj.input_scale"]),
        ("w8a8 static tensor", drop_all("input_scale"), ["missing", "q_proj.input_scale"]),
        ("w8a8 static asymmetric", drop("o_proj.input_zero_point"), ["missing", "o_proj.input_z"]),
        ("w4a8", drop("k_proj.weight"), ["missing", "k_proj.weight (layer"]),
        ("w4a8", drop("o_proj.weight_scale"), ["missing", "o_proj.weight_scale"]),
        ("w8a16", drop("k_proj.weight_zero_point"), ["missing", "k_proj.weight_zero_point"]),
        ("w2a16", drop("o_proj.weight_packed"), ["missing", "o_proj.weight_packed"]),
        ("w8a8", put("q_proj.weight", lambda t: t.float()), ["q_proj.weight:", "int8", "float32"]),
        ("w4a8", put("q_proj.weight", lambda t: t.int()), ["q_proj.weight:", "int8", "int32"]),
        ("w8a8", put("q_proj.weight", lambda t: t[:, :-1].contiguous()), ["q_proj.weight", "127"]),
        ("w8a8", put("o_proj.weight_scale", torch.ones(7, 1)), ["o_proj.weight_scale", "(7, 1)"]),
        (
            "w8a8",
            put("o_proj.weight_scale", torch.ones(128, 1).int()),
            ["weight_scale", "floating"],
        ),
        (
            "w8a8 static asymmetric",
            put("o_proj.input_zero_point", torch.tensor([3.0])),
            ["o_proj.input_zero_point", "integer", "float32"],
        ),
        (
            "w8a8",
            lambda state: state.update({f"{ATTENTION}.o_proj.input_scale": torch.ones(1)}),
            ["o_proj.input_scale", "does not fit"],
        ),
        (
            "w8a8",
            lambda state: state.update({f"{ATTENTION}.o_proj.bias": torch.ones(128)}),
            ["o_proj.bias", "surplus"],
        ),
    ],
)
def test_missing_surplus_and_misfitting_tensors_are_refused_by_name(tmp_path, name, spoil, words):
    write(tmp_path, name, spoil)
    with pytest.raises(CheckpointError) as caught:
        tiny_llama.load(tmp_path)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        (
            "w8a8 static tensor",
            put("o_proj.input_scale", torch.zeros(1)),
            "input_scale: .*positive",
        ),
        (
            "w8a8 static tensor",
            put("o_proj.input_scale", -torch.ones(1)),
            "input_scale: .*positive",
        ),
        (
            "w8a8 static tensor",
            put("o_proj.input_scale", torch.tensor([torch.nan])),
            "input_scale: .*finite",
        ),
        (
            "w8a8 static asymmetric",
            put("o_proj.input_zero_point", torch.tensor([200])),
            "input_zero_point: .*200",
        ),
        (
            "w8a8",
            put("o_proj.weight_scale", torch.full((128, 1), torch.inf)),
            "weight_scale: 128 of",
        ),
        ("w4a8", put("o_proj.weight", lambda t: t * 2), "weight: values of -16 to 14"),
    ],
)
def test_impossible_values_are_refused_by_name(tmp_path, name, spoil, message):
    write(tmp_path, name, spoil)
    with pytest.raises(ValueError, match=rf"{ATTENTION}\.o_proj\.{message}"):
        tiny_llama.load(tmp_path)


def test_legal_scales_load(tmp_path):
    """Zero and negative scales of weights are legal."""

    def spoil(state):
        scale = state[f"{ATTENTION}.o_proj.weight_scale"]
        scale[:5] = 0
        scale[5:9] *= -1

    write(tmp_path, "w8a8", spoil)
    tiny_llama.load(tmp_path)


@pytest.mark.parametrize("name", FORMATS)
def test_reload_equals_a_fresh_load(tmp_path, name):
    """Twice, with new values: bit for bit, in the old tensors."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    write(tmp_path / "first", name)
    model = tiny_llama.load(tmp_path / "first")
    places = {key: param.data_ptr() for key, param in model.named_parameters()}
    for seed in (1, 2):
        path = tmp_path / str(seed)
        state = write(path, name, seed=seed)
        config = tiny_llama.engine_config(path)
        with set_current_vllm_config(config):
            initialize_layerwise_reload(model)
            model.load_weights(iter(state.items()))
            finalize_layerwise_reload(model, config.model_config)
        fresh = dict(tiny_llama.load(path).named_parameters())
        assert set(fresh) == set(places)
        for key, param in model.named_parameters():
            assert param.data_ptr() == places[key]
            assert torch.equal(param, fresh[key]), key
