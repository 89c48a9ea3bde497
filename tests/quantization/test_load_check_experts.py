# SPDX-License-Identifier: Apache-2.0
"""load_check.py with routed experts: what is missing is named as the checkpoint names it."""

import pytest
import torch

pytest.importorskip("vllm")

from vllm_plugin_tm import selftest
from vllm_plugin_tm.quantization import load_check
from vllm_plugin_tm.quantization.experts_kernel import Activation, Names, TMExpertsKernel
from vllm_plugin_tm.quantization.load_check import CheckpointError
from vllm_plugin_tm.quantization.support_matrix import MoeRequest

PREFIX = "model.layers.2.mlp.experts"
EXPERTS, HIDDEN, INTERMEDIATE, GROUP = 3, 64, 32, 16
PACKED = Names("weight_packed", "weight_scale", "weight_zero_point")
BYTES = Names("weight", "weight_scale")
K_FIRST = Names("qweight", "scales", "qzeros", k_first=True)
EVERY = [f"{expert}.{part}" for expert in range(EXPERTS) for part in ("gate", "up", "down")]


@pytest.fixture(autouse=True)
def _no_self_test(monkeypatch):
    """No kernel runs here, so none needs to be right."""
    monkeypatch.setattr(selftest, "require", lambda scheme: None)


def layers(names=PACKED, gated=True, zero_points=False, expert_map=None, scale=torch.bfloat16):
    """The two products of a layer as its kernel describes them to the checks, and its module."""
    is_bytes = names is BYTES
    request = MoeRequest(
        scheme="w4a8" if is_bytes else "w4a16",
        weight_type="int4" if is_bytes else "uint4" if zero_points else "uint4b8",
        zero_points=zero_points,
        group_size=GROUP,
        act_dtype="bfloat16",
        hidden=HIDDEN,
        intermediate=INTERMEDIATE,
        full_intermediate=INTERMEDIATE,
        activation="silu" if gated else "silu_no_mul",
    )
    module = torch.nn.Module()
    module.layer_name = PREFIX
    module.ckpt_gate_proj_name, module.ckpt_down_proj_name = "gate", "down"
    module.ckpt_up_proj_name = "up" if gated else None
    module.local_num_experts, module.expert_map = EXPERTS, expert_map
    for product, n, k in (
        ("w13", INTERMEDIATE * (2 if gated else 1), HIDDEN),
        ("w2", HIDDEN, INTERMEDIATE),
    ):
        shapes = {
            names.weight: ((n, k) if is_bytes else (n, k // 8)),
            names.scale: (n, k // GROUP),
        }
        if zero_points:
            shapes[names.zero_point] = (n // 8, k // GROUP)
        for name, shape in shapes.items():
            dtype = torch.int8 if is_bytes else torch.int32
            if name == names.scale:
                dtype = scale
            if names.k_first:
                # Zero points of these formats are packed along the output too.
                shape = shape[::-1]
            data = torch.zeros(EXPERTS, *shape, dtype=dtype)
            module.register_parameter(f"{product}_{name}", torch.nn.Parameter(data, False))
    activation = Activation("swiglu" if gated else "silu_no_mul")
    kernel = TMExpertsKernel(request, activation, names)
    return kernel.loaded("model.layers.2.mlp.experts.routed_experts", module, ()), module


def load(module, names, expert, part, tensors=None, gated=True):
    """Fills the tensors of one checkpoint module, whatever the order of the parameters."""
    product = "w2" if part == "down" else "w13"
    for name in tensors or [names.weight, names.scale]:
        data = getattr(module, f"{product}_{name}").data[expert]
        rows = data.t() if names.k_first else data
        half = rows.shape[0] // (2 if gated and product == "w13" else 1)
        start = half if part == "up" else 0
        rows[start : start + half] = 1


def missing(marked):
    """The tensors that are named, as "0.gate.weight_packed"; none where nothing is missing."""
    try:
        load_check.refuse_missing(marked)
    except CheckpointError as error:
        lines = str(error).splitlines()[1:]
        assert all(line.startswith(f"  {PREFIX}.") for line in lines)
        return [line.split()[0].removeprefix(f"{PREFIX}.") for line in lines]
    return []


@pytest.mark.parametrize("names", [PACKED, BYTES, K_FIRST], ids=["packed", "bytes", "k_first"])
@pytest.mark.parametrize("hole", EVERY)
@pytest.mark.parametrize("which", ["all", "weight", "scale"])
def test_each_missing_tensor_is_named_and_no_other(names, hole, which):
    described, module = layers(names)
    marked = load_check.mark(described)
    absent = {"all": [names.weight, names.scale], "weight": [names.weight], "scale": [names.scale]}
    for source in EVERY:
        expert, part = source.split(".")
        tensors = [names.weight, names.scale]
        if source == hole:
            tensors = [name for name in tensors if name not in absent[which]]
        if tensors:
            load(module, names, int(expert), part, tensors)
    assert sorted(missing(marked)) == sorted(f"{hole}.{name}" for name in absent[which])


@pytest.mark.parametrize("names", [PACKED, K_FIRST], ids=["packed", "k_first"])
@pytest.mark.parametrize("hole", ["1.gate", "2.up", "0.down"])
def test_missing_zero_points_are_named(names, hole):
    described, module = layers(names, zero_points=True)
    marked = load_check.mark(described)
    for source in EVERY:
        expert, part = source.split(".")
        zeros = [] if source == hole else [names.zero_point]
        load(module, names, int(expert), part, [names.weight, names.scale, *zeros])
    assert missing(marked) == [f"{hole}.{names.zero_point}"]


def test_a_missing_expert_is_named_with_all_its_tensors():
    described, module = layers()
    marked = load_check.mark(described)
    for source in EVERY:
        expert, part = source.split(".")
        if expert != "1":
            load(module, PACKED, int(expert), part)
    assert sorted(missing(marked)) == sorted(
        f"1.{part}.{name}"
        for part in ("gate", "up", "down")
        for name in ("weight_packed", "weight_scale")
    )


def test_an_error_says_which_layer_of_the_model_it_is():
    described, _ = layers()
    marked = load_check.mark(described)
    with pytest.raises(CheckpointError) as caught:
        load_check.refuse_missing(marked)
    text = str(caught.value)
    assert f"{PREFIX}.0.gate.weight_packed (layer {PREFIX}.routed_experts)" in text
    assert text.endswith(f"and {2 * len(EVERY) - 8} more")


@pytest.mark.parametrize("scale", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype_of_scales_is_marked(scale):
    described, module = layers(scale=scale)
    marked = load_check.mark(described)
    assert bool(module.w2_weight_scale.isnan().all())
    for source in EVERY:
        expert, part = source.split(".")
        load(module, PACKED, int(expert), part)
    assert missing(marked) == []


def test_layers_without_gates_have_no_ups():
    described, module = layers(gated=False)
    marked = load_check.mark(described)
    for expert in range(EXPERTS):
        load(module, PACKED, expert, "gate", gated=False)
        if expert != 2:
            load(module, PACKED, expert, "down", gated=False)
    assert missing(marked) == ["2.down.weight_packed", "2.down.weight_scale"]


def test_only_the_experts_of_this_rank_are_required():
    """Experts 6, 1 and 4 of eight lie here, in this order."""
    here = torch.tensor([-1, 1, -1, -1, 2, -1, 0, -1], dtype=torch.int32)
    described, module = layers(expert_map=here)
    marked = load_check.mark(described)
    for source in EVERY:
        expert, part = source.split(".")
        if (expert, part) != ("2", "up"):
            load(module, PACKED, int(expert), part)
    assert missing(marked) == ["4.up.weight_packed", "4.up.weight_scale"]
    load(module, PACKED, 2, "up")
    assert missing(marked) == []


def test_parameters_in_kernel_layout_are_left_alone():
    """A reload marks what is loaded into, not the weights that are being run."""
    from vllm_plugin_tm.quantization.kernel import put

    described, module = layers()
    for layer in described:
        for name in layer.tensors:
            put(module, name, torch.full_like(getattr(module, name), 5))
    assert load_check.mark(described) == []
    assert all(bool((param == 5).all()) for param in module.parameters())


@pytest.mark.parametrize("part", ["gate", "up", "down"])
def test_misfitting_tensors_of_experts_are_refused_by_name(part):
    described, _ = layers()
    sources = {source: layer for layer in described for source, _ in layer.sources}
    assert len(sources) == len(EVERY)
    name = f"{PREFIX}.1.{part}.weight"
    load_check.refuse_unfit(f"{name}_packed", torch.zeros(2, dtype=torch.int32), sources)
    load_check.refuse_unfit(f"{name}_scale", torch.zeros(2), sources)
    with pytest.raises(CheckpointError, match=rf"1\.{part}\.weight_packed: .*int32.*float32"):
        load_check.refuse_unfit(f"{name}_packed", torch.zeros(2), sources)
    with pytest.raises(CheckpointError, match=rf"1\.{part}\.weight_scale: .*floating.*int8"):
        load_check.refuse_unfit(f"{name}_scale", torch.zeros(2).char(), sources)
    with pytest.raises(CheckpointError, match=rf"1\.{part}\.bias: surplus"):
        load_check.refuse_unfit(f"{PREFIX}.1.{part}.bias", torch.ones(2), sources)
    load_check.refuse_unfit(f"{PREFIX}.1.{part}.bias", torch.zeros(2), sources)
