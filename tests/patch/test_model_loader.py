# SPDX-License-Identifier: Apache-2.0
"""patch/model_loader.py with a tiny model: what is refused by name, what loads, what is logged."""

import os
from types import SimpleNamespace

import pytest
import tiny_llama
import torch

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

from vllm_plugin_tm import layer_table
from vllm_plugin_tm.patch import apply
from vllm_plugin_tm.patch import model_loader as patched_loader
from vllm_plugin_tm.quantization.load_check import CheckpointError

pytestmark = pytest.mark.slow

ATTENTION = "model.layers.1.self_attn"


@pytest.fixture(autouse=True)
def _patched(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # vLLM's CPU worker does the same: there is no cache to empty.
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    apply.apply()
    yield
    apply.remove()


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a checkpoint, changed by `spoil(state)`, and loads it."""

    def write_and_load(spoil=None, load=None, **options):
        made = {k: v for k, v in options.items() if k != "activations"}
        state = tiny_llama.tensors(**made)
        if spoil is not None:
            spoil(state)
        saved = {k: v for k, v in options.items() if k != "static"}
        tiny_llama.save(tmp_path, state, **saved)
        return tiny_llama.load(tmp_path, **(load or {}))

    return write_and_load


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"symmetric": False, "group": -1},
        {"symmetric": False, "group": 64, "load": {"dtype": "float16"}},
        {"load": {"dtype": "float32"}},
        {"load": {"load_format": "dummy"}},
        {"group": -1, "intermediate": 260},  # input size of down_proj is no multiple of 8
    ],
)
def test_good_checkpoints_load_and_the_table_counts_every_layer(checkpoint, options, monkeypatch):
    logged = []
    recorder = SimpleNamespace(info=lambda text, *args: logged.append(text % args))
    monkeypatch.setattr(patched_loader, "logger", recorder)
    checkpoint(**options)
    ours, rest = layer_table.last()
    assert (ours.count, ours.on_tm, ours.kernel) == (8, True, "TMWNA16LinearKernel")
    assert ours.scheme == "CompressedTensorsWNA16"
    assert ours.isa == ops.get_isa()
    assert ours.group_size == options.get("group", 32)
    assert ours.example == "model.layers.0.self_attn.qkv_proj"
    assert (rest.count, rest.on_tm, rest.note) == (2, False, "not quantized")
    (text,) = logged
    assert text.startswith("vllm-plugin-tm layers: 8 of 10 on TM kernels\n")


def drop(*names):
    def spoil(state):
        for name in names:
            del state[name]

    return spoil


def put(name, function):
    def spoil(state):
        state[name] = function(state.get(name))

    return spoil


def with_value(value):
    def change(tensor):
        tensor[3, 1] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("spoil", "symmetric", "words"),
    [
        (drop(f"{ATTENTION}.k_proj.weight_packed"), True, ["missing", "k_proj.weight_packed"]),
        (drop(f"{ATTENTION}.v_proj.weight_scale"), True, ["missing", "v_proj.weight_scale"]),
        (
            drop(f"{ATTENTION}.o_proj.weight_zero_point"),
            False,
            ["missing", f"{ATTENTION}.o_proj.weight_zero_point"],
        ),
        (
            drop(*(f"model.layers.0.mlp.up_proj.weight_{x}" for x in ("packed", "scale"))),
            True,
            ["missing", "up_proj.weight_packed", "up_proj.weight_scale", "0.mlp.gate_up_proj"],
        ),
        (
            put(f"{ATTENTION}.q_proj.weight_extra", lambda _: torch.ones(3)),
            True,
            [f"{ATTENTION}.q_proj.weight_extra", "does not fit"],
        ),
        (
            put(f"{ATTENTION}.q_proj.weight_g_idx", lambda _: torch.zeros(128, dtype=torch.int32)),
            True,
            [f"{ATTENTION}.q_proj.weight_g_idx", "does not fit"],
        ),
        (
            put("model.layers.7.mlp.down_proj.weight_scale", lambda _: torch.ones(128, 8)),
            True,
            ["model.layers.7.mlp.down_proj.weight_scale", "does not fit"],
        ),
        (
            put(f"{ATTENTION}.q_proj.bias", lambda _: torch.ones(128)),
            True,
            [f"{ATTENTION}.q_proj.bias", "surplus"],
        ),
        (
            put(f"{ATTENTION}.o_proj.weight_packed", lambda t: t[:, :-1].contiguous()),
            True,
            [f"{ATTENTION}.o_proj.weight_packed", "(128, 15)"],
        ),
        (
            put(f"{ATTENTION}.q_proj.weight_packed", lambda t: t.float()),
            True,
            [f"{ATTENTION}.q_proj.weight_packed", "int32", "float32"],
        ),
    ],
)
def test_incomplete_and_misfitting_checkpoints_are_refused_by_name(
    checkpoint, spoil, symmetric, words
):
    with pytest.raises(CheckpointError) as caught:
        checkpoint(spoil, symmetric=symmetric)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers_are_refused_by_name(checkpoint, value):
    words = rf"{ATTENTION}.qkv_proj.weight_scale: 1 of 1024 .*{value} at output row 195, group 1"
    with pytest.raises(ValueError, match=words):
        checkpoint(put(f"{ATTENTION}.v_proj.weight_scale", with_value(value)))


def test_group_sizes_that_do_not_divide_name_the_layer(checkpoint):
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.mlp\.down_proj: ") as caught:
        checkpoint(group=64, intermediate=232)
    assert "input size (232) must be a multiple of the group size (64)" in str(caught.value)


def test_group_sizes_that_upstream_takes_but_do_not_divide_name_the_layer(checkpoint):
    """Here upstream's kernel says yes, and its loader finds out; it names the layer as well."""
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.qkv_proj"):
        checkpoint(group=48, intermediate=192)


def test_truncated_files_are_refused_by_name(tmp_path):
    tiny_llama.save(tmp_path, tiny_llama.tensors())
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        tiny_llama.load(tmp_path)


def test_activation_quantization_that_upstream_ignores_is_done_or_said(checkpoint):
    checkpoint(activations=tiny_llama.int8_activations())
    row = layer_table.last()[0]
    assert (row.on_tm, row.scheme) == (True, "CompressedTensorsWNA8Int")
    assert row.note == "int8 activations, per token"
    checkpoint(activations=tiny_llama.int8_activations() | {"num_bits": 4})
    row = layer_table.last()[0]
    assert (row.on_tm, row.scheme) == (True, "CompressedTensorsWNA4Int")
    assert "activations are not quantized" in row.note
    assert "4-bit activations" in row.note


def test_errors_before_any_tensor_are_left_as_they_are(tmp_path):
    tiny_llama.save(tmp_path, tiny_llama.tensors())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        tiny_llama.load(tmp_path)
