# SPDX-License-Identifier: Apache-2.0
"""FP8 and FP4 checkpoints of every form through vLLM's loader: each layer against the oracle on
the checkpoint's own tensors, the layer table, reloads, and what is refused by name."""

from dataclasses import replace

import float_llama
import pytest
import tiny_llama
import torch
from float_llama import FORMS, INTERMEDIATE

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

from vllm_plugin_tm import layer_table
from vllm_plugin_tm.patch import apply
from vllm_plugin_tm.quantization.load_check import CheckpointError

pytestmark = pytest.mark.slow

ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.1.mlp"
FUSED = {
    f"{ATTENTION}.qkv_proj": [f"{ATTENTION}.{part}_proj" for part in "qkv"],
    f"{ATTENTION}.o_proj": [f"{ATTENTION}.o_proj"],
    f"{MLP}.gate_up_proj": [f"{MLP}.gate_proj", f"{MLP}.up_proj"],
    f"{MLP}.down_proj": [f"{MLP}.down_proj"],
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
    """A checkpoint of this form; its tensors."""
    form = FORMS[name]
    state = float_llama.tensors(form, seed)
    if spoil is not None:
        spoil(state)
    quantization = float_llama.quantization(form)
    tiny_llama.save(path, state, intermediate=INTERMEDIATE, quantization=quantization)
    return state


def check_layers(model, form, state):
    for name, parts in FUSED.items():
        layer = model.get_submodule(name)
        x = torch.randn(5, state_width(state, parts[0])).bfloat16()
        y = layer.quant_method.apply(layer, x)
        want, allowed = float_llama.product(form, state, parts, x)
        assert ((y.double() - want).abs() <= allowed).all(), name


def state_width(state, name):
    weight = state.get(f"{name}.weight")
    return 2 * state[f"{name}.weight_packed"].shape[1] if weight is None else weight.shape[1]


@pytest.mark.parametrize("name", FORMS)
def test_every_layer_is_what_the_checkpoint_says(tmp_path, name):
    torch.manual_seed(1)
    form = FORMS[name]
    state = write(tmp_path, name)
    model = tiny_llama.load(tmp_path)
    ours, rest = layer_table.last()[0], layer_table.last()[-1]
    assert (ours.scheme, ours.kernel) == (form.scheme, form.kernel)
    assert ours.on_tm
    assert sum(row.count for row in layer_table.last() if row.on_tm) == 8
    assert not rest.on_tm
    check_layers(model, form, state)


@pytest.mark.parametrize("name", ["tensor static", "block", "fp8 tensor", "nvfp4", "mxfp4"])
def test_dummy_weights_are_numbers(tmp_path, name):
    write(tmp_path, name)
    model = tiny_llama.load(tmp_path, load_format="dummy")
    for fused, parts in FUSED.items():
        layer = model.get_submodule(fused)
        x = torch.randn(3, INTERMEDIATE if "down" in parts[0] else tiny_llama.HIDDEN).bfloat16()
        assert bool(layer.quant_method.apply(layer, x).isfinite().all())


def missing(leaf):
    def spoil(state):
        del state[f"{MLP}.up_proj.{leaf}"]

    return spoil


def changed(leaf, change):
    def spoil(state):
        name = f"{MLP}.up_proj.{leaf}"
        state[name] = change(state[name].clone())

    return spoil


def first(value):
    def change(tensor):
        flat = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
        flat.view(-1)[0] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("channel token", missing("weight"), r"missing.*\n.*up_proj\.weight \("),
        ("channel token", missing("weight_scale"), r"missing.*\n.*up_proj\.weight_scale"),
        ("fp8 block", missing("weight_scale_inv"), r"missing.*\n.*up_proj\.weight_scale_inv"),
        ("tensor static", missing("input_scale"), r"missing.*\n.*up_proj\.input_scale"),
        ("mxfp4", missing("weight_scale"), r"missing.*\n.*up_proj\.weight_scale"),
        ("nvfp4", missing("weight_packed"), r"missing.*\n.*up_proj\.weight_packed"),
        ("nvfp4", missing("weight_global_scale"), r"missing.*\n.*weight_global_scale"),
        (
            "channel token",
            changed("weight", first(0xFF)),
            r"gate_up_proj\.weight: 1 of .* not",
        ),
        (
            "channel token",
            changed("weight_scale", first(float("inf"))),
            r"gate_up_proj\.weight_scale: 1 of 384 scales are infinite",
        ),
        ("tensor static", changed("input_scale", first(-1.0)), r"input_scale: expected positive"),
        ("mxfp4", changed("weight_scale", first(0xFF)), r"gate_up_proj\.weight_scale: 1 of"),
        ("nvfp4", changed("weight_scale", first(0x7F)), r"gate_up_proj\.weight_scale: 1 of"),
        ("nvfp4", changed("weight_global_scale", first(0.0)), r"global_scale: expected positive"),
        (
            "mxfp4",
            changed("weight_packed", lambda t: t.view(torch.int8)),
            r"expected dtype torch",
        ),
        ("block", changed("weight", lambda t: t.view(torch.int8)), r"expected dtype torch.float8"),
    ],
)
def test_damage_is_refused_by_name(tmp_path, name, spoil, message):
    write(tmp_path, name, spoil)
    with pytest.raises((CheckpointError, ValueError), match=message):
        tiny_llama.load(tmp_path)


def test_parts_that_end_inside_a_block_are_refused_by_name(tmp_path, monkeypatch):
    """64 rows of keys in blocks of 128, before the values: upstream lets this method's fused layers
    through."""
    monkeypatch.setitem(FORMS, "wide", replace(FORMS["fp8 block"], block=128))
    write(tmp_path, "wide")
    message = r"qkv_proj: the output size of a part of a fused layer \(64, of \[128, 64, 64\]\)"
    with pytest.raises(ValueError, match=message):
        tiny_llama.load(tmp_path)
