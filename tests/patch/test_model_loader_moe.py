# SPDX-License-Identifier: Apache-2.0
"""patch/model_loader.py and patch/moe_methods.py with a tiny mixture of experts: what loads, what
the layer table says, what is refused by name."""

import os

import pytest
import tiny_llama
import tiny_moe
import torch

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

from vllm_plugin_tm import envs, layer_table
from vllm_plugin_tm.kernels import reference_moe
from vllm_plugin_tm.patch import apply
from vllm_plugin_tm.quantization.load_check import CheckpointError

pytestmark = pytest.mark.slow

EXPERTS = tiny_moe.EXPERTS_NAME
BYTES = {"packed": False}
# options of the checkpoint -> the oracle's scheme, upstream's method, the table's note
FORMATS = {
    "w4a16": ({}, "w4a16", "WNA16", ""),
    "w4a16 asymmetric": ({"symmetric": False}, "w4a16", "WNA16", ""),
    "w4a16 channel": ({"group": -1}, "w4a16", "WNA16", ""),
    "w8a16": ({"bits": 8}, "w8a16", "WNA16", ""),
    "w4a8": (BYTES, "w4a8", "W4A8Int8", "int8 activations, per token"),
    "w4a8 packed": ({"rounded": True}, "w4a8", "WNA16", "int8 activations, per token"),
    "w4a8 packed channel": (
        {"rounded": True, "group": -1},
        "w4a8",
        "WNA16",
        "int8 activations, per token",
    ),
    "w8a8": (
        BYTES | {"bits": 8, "group": -1},
        "w8a8",
        "W8A8Int8",
        "int8 activations, per token",
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


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a checkpoint, changed by `spoil(state)`, and loads it: (model, its tensors)."""

    def write_and_load(spoil=None, load=None, **options):
        state = tiny_moe.tensors(**{k: v for k, v in options.items() if k != "rounded"})
        if spoil is not None:
            spoil(state)
        tiny_moe.save(tmp_path, state, **options)
        return tiny_llama.load(tmp_path, **(load or {})), state

    return write_and_load


def experts_of(model):
    """The module that holds the experts' weights."""
    (found,) = [m for m in model.modules() if layer_table.tm_kernel_of(m) is not None]
    return found


def from_disk(state, bits):
    """The checkpoint's experts as the oracle wants them: (w13, w2)."""

    def stacked(parts, leaf):
        names = [
            [f"{EXPERTS}.{e}.{part}_proj.{leaf}" for part in parts] for e in range(tiny_moe.EXPERTS)
        ]
        if names[0][0] not in state:
            return None
        return torch.stack([torch.cat([state[name] for name in row]) for row in names])

    def experts(*parts):
        packed = stacked(parts, "weight_packed")
        codes = stacked(parts, "weight") if packed is None else packed
        zeros = stacked(parts, "weight_zero_point")
        return reference_moe.Experts(codes, stacked(parts, "weight_scale"), zeros, None, bits)

    return experts("gate", "up"), experts("down")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_loads_runs_right_and_the_table_shows_it(checkpoint, name):
    options, scheme, method, note = FORMATS[name]
    model, state = checkpoint(**options)
    ours, *rest = layer_table.last()
    assert (ours.count, ours.on_tm, ours.kernel) == (1, True, "TMExpertsKernel")
    assert ours.scheme == f"CompressedTensors{method}MoEMethod"
    assert (ours.isa, ours.group_size) == (ops.get_isa(), options.get("group", 16))
    assert ours.note == note
    assert ours.example.startswith(EXPERTS)
    assert not any(row.on_tm for row in rest)

    layer = experts_of(model)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(7, tiny_moe.HIDDEN, generator=generator).to(torch.bfloat16)
    weights = torch.rand(7, tiny_moe.TOP_K, generator=generator)
    ids = torch.rand(7, tiny_moe.EXPERTS, generator=generator).topk(2).indices.to(torch.int32)
    y = layer.quant_method.apply(layer, x, weights, ids, None, None)
    w13, w2 = from_disk(state, options.get("bits", 4))
    arguments = (scheme, x, weights, ids, w13, w2, reference_moe.Activation())
    off = (y.double() - reference_moe.moe(*arguments)).abs()
    assert bool((off <= reference_moe.moe_tolerance(*arguments)).all())


def test_packed_weights_with_int8_activations_that_we_may_not_take(checkpoint, monkeypatch):
    """Upstream has a method for bytes only, and its refusal carries our reason."""
    monkeypatch.setenv(envs.TAKEN_SCHEMES.name, "w4a16,w8a8")
    with pytest.raises(NotImplementedError, match="w4a8 is not among the schemes to take"):
        checkpoint(rounded=True)


@pytest.mark.parametrize("name", ["w4a16 asymmetric", "w4a8", "w4a8 packed", "w8a8"])
def test_dummy_weights_load(checkpoint, name):
    model, _ = checkpoint(load={"load_format": "dummy"}, **FORMATS[name][0])
    layer = experts_of(model)
    x = torch.ones(1, tiny_moe.HIDDEN, dtype=torch.bfloat16)
    ids = torch.tensor([[0, 3]], dtype=torch.int32)
    y = layer.quant_method.apply(layer, x, torch.ones(1, 2), ids, None, None)
    assert bool(y.isfinite().all())


def drop(*names):
    def spoil(state):
        for name in names:
            del state[f"{EXPERTS}.{name}"]

    return spoil


def put(name, change):
    def spoil(state):
        full = f"{EXPERTS}.{name}"
        state[full] = change(state.get(full))

    return spoil


def parts_of(expert):
    return [
        f"{expert}.{part}_proj.weight_{leaf}"
        for part in ("gate", "up", "down")
        for leaf in ("packed", "scale")
    ]


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (["2.up_proj.weight_packed"], {}),
        (["3.gate_proj.weight_scale"], {}),
        (["0.down_proj.weight_packed", "0.down_proj.weight_scale"], {}),
        (["1.down_proj.weight_zero_point"], {"symmetric": False}),
        (["1.up_proj.weight_zero_point"], {"symmetric": False}),
        (["1.gate_proj.weight"], BYTES),
        (["2.down_proj.weight_scale"], BYTES | {"bits": 8, "group": -1}),
        (parts_of(3), {}),
    ],
)
def test_missing_tensors_are_refused_by_name_and_no_other_is_named(checkpoint, names, options):
    with pytest.raises(CheckpointError, match="missing in the checkpoint") as caught:
        checkpoint(drop(*names), **options)
    lines = str(caught.value).splitlines()[1:]
    assert sorted(line.split()[0] for line in lines) == sorted(f"{EXPERTS}.{n}" for n in names)


def larger(dim):
    return lambda t: torch.cat([t, t.narrow(dim, 0, 1)], dim).contiguous()


def smaller(dim):
    return lambda t: t.narrow(dim, 0, t.shape[dim] - 1).contiguous()


@pytest.mark.parametrize(
    "change",
    [larger(0), larger(1), smaller(0), smaller(1)],
    ids=["a row more", "a column more", "a row less", "a column less"],
)
@pytest.mark.parametrize(
    "name",
    [
        f"{expert}_proj.weight_{leaf}"
        for expert in ("0.gate", "1.up", "2.down")
        for leaf in ("packed", "scale")
    ],
)
def test_tensors_of_another_shape_are_refused_by_name(checkpoint, change, name):
    """Upstream's loader of experts would take a smaller tensor and leave the rest as it was."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint(put(name, change))
    assert f"{EXPERTS}.{name}" in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        (
            put("1.up_proj.weight_packed", lambda t: t.float()),
            {},
            ["1.up_proj.weight_packed", "int32", "float32"],
        ),
        (
            put("1.up_proj.weight", lambda t: t.to(torch.bfloat16)),
            BYTES,
            ["1.up_proj.weight", "int8", "bfloat16"],
        ),
        (
            put("0.down_proj.bias", lambda _: torch.ones(tiny_moe.HIDDEN)),
            {},
            ["0.down_proj.bias", "surplus"],
        ),
        (
            put("0.gate_proj.weight_extra", lambda _: torch.ones(3)),
            {},
            ["0.gate_proj.weight_extra"],
        ),
    ],
)
def test_misfitting_tensors_are_refused_by_name(checkpoint, spoil, options, words):
    with pytest.raises(CheckpointError) as caught:
        checkpoint(spoil, **options)
    for word in words:
        assert word in str(caught.value)


def with_value(value):
    def change(tensor):
        tensor[3, 0] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("name", "value", "options", "message"),
    [
        ("2.up_proj.weight_scale", torch.nan, {}, "expert 2.w13_weight_scale: .*nan .*row 35"),
        ("1.down_proj.weight_scale", torch.inf, {}, "expert 1.w2_weight_scale: .*inf .*row 3"),
        ("0.gate_proj.weight", 9, BYTES, "expert 0.w13_weight: values of -8 to 9"),
    ],
)
def test_damaged_values_are_refused_by_layer_expert_and_tensor(
    checkpoint, name, value, options, message
):
    with pytest.raises(ValueError, match=rf"{EXPERTS}.*, {message}"):
        checkpoint(put(name, with_value(value)), **options)


def test_truncated_files_are_refused_by_name(tmp_path):
    tiny_moe.save(tmp_path, tiny_moe.tensors())
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        tiny_llama.load(tmp_path)
