# SPDX-License-Identifier: Apache-2.0
"""Our methods for routed experts: reload, refusals of damaged tensors, memory of the tensors."""

import gc
import weakref

import pytest
import torch

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

from experts_cases import (
    FORMATS,
    PREFIX,
    SOME,
    Format,
    Layer,
    assert_right,
    create,
    fill,
    loaded,
    make_method,
    moe_config,
    processed,
    routing,
)

pytestmark = [pytest.mark.usefixtures("patched"), pytest.mark.slow]

W4A16 = Format("WNA16", 4, 32)
W4A8 = Format("W4A8Int8", 4, 32)


def shapes(layer):
    return {name: (p.shape, p.dtype) for name, p in layer.named_parameters()}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", SOME, ids=str)
def test_new_values_give_what_a_fresh_layer_gives(form, bias):
    """Reload: upstream creates the parameters anew, loads, processes, and copies the results into
    the parameters that were there."""
    config = moe_config(has_bias=bias)
    case = processed(form, seed=1, config=config)
    first = shapes(case.layer)
    old = dict(case.layer.named_parameters())
    fresh = processed(form, seed=2, config=config)
    assert shapes(fresh.layer) == first

    create(case.method, case.layer)
    case.w13, case.w2 = fill(form, case.layer, seed=2)
    case.method.process_weights_after_loading(case.layer)
    assert shapes(case.layer) == first
    for name, param in fresh.layer.named_parameters():
        if not name.endswith("weight_shape"):  # never filled here, and not read
            assert torch.equal(case.layer.get_parameter(name), param), name
    for name, param in old.items():
        param.data.copy_(case.layer.get_parameter(name))
        setattr(case.layer, name, param)
    assert_right(case)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_parameters_hold_the_layer_and_the_kernel_holds_no_tensor(form):
    case = loaded(form)
    names = {name for name, _ in case.layer.named_parameters()}
    case.method.process_weights_after_loading(case.layer)
    added = {name for name, _ in case.layer.named_parameters()} - names
    assert added == ({"w13_weight_sum", "w2_weight_sum"} if form.scheme == "w8a8" else set())
    assert not any(isinstance(value, torch.Tensor) for value in vars(case.kernel).values())


@pytest.mark.parametrize("form", SOME, ids=str)
def test_weights_that_are_in_kernel_layout_are_not_processed_again(form):
    case = processed(form)
    with pytest.raises(ValueError, match=rf"{PREFIX}.*w13_weight"):
        case.method.process_weights_after_loading(case.layer)


@pytest.mark.parametrize(("form", "packed"), [(W4A16, 2), (W4A8, 2), (FORMATS[-1], 1)], ids=str)
def test_the_disk_tensors_are_freed_and_resident_bytes_are_bounded(form, packed):
    hidden, inner = 512, 256
    config = moe_config(hidden_dim=hidden, intermediate_size=inner)
    method = make_method(form, config)
    layer = Layer(config)
    create(method, layer)
    products = ("w13", "w2")
    for product in products:
        getattr(layer, f"{product}_{form.codes}").data.zero_()
    scales = sum(getattr(layer, f"{w}_weight_scale").numel() for w in products)
    old = [weakref.ref(getattr(layer, f"{w}_{form.codes}")) for w in products]
    method.process_weights_after_loading(layer)
    gc.collect()
    assert [ref() for ref in old] == [None, None]
    weights = method.moe.num_experts * 3 * hidden * inner // packed
    names = [f"{w}_{part}" for w in products for part in (form.codes, "weight_scale")]
    held = sum(layer.get_parameter(name).nbytes for name in names)
    assert held <= 1.05 * (weights + 4 * scales)  # scales are float32 in the kernel layout


def with_value(name, expert, value):
    def spoil(layer):
        getattr(layer, name).data[expert, 5, 0] = value

    return spoil


def with_tensor(name, change):
    def spoil(layer):
        param = getattr(layer, name)
        param.data = change(param.data)

    return spoil


DAMAGED = [
    (W4A16, with_value("w13_weight_scale", 2, torch.nan), "2.w13_weight_scale: 1 of .*nan .*row 5"),
    (W4A16, with_value("w2_weight_scale", 4, -torch.inf), "4.w2_weight_scale: 1 of .*-inf .*row 5"),
    (FORMATS[-1], with_value("w2_weight_scale", 1, torch.inf), "1.w2_weight_scale: 1 of .*inf "),
    (W4A8, with_value("w13_weight_scale", 0, torch.nan), "0.w13_weight_scale: 1 of .*nan "),
    (W4A8, with_value("w13_weight", 3, 8), "3.w13_weight: values of -8 to 8, .*-8 to 7"),
    (W4A8, with_value("w2_weight", 1, -9), "1.w2_weight: values of -9 to 7, .*-8 to 7"),
    (W4A8, with_value("w2_weight", 4, 127), "4.w2_weight: values of -8 to 127"),
    (
        W4A16,
        with_tensor("w13_weight_packed", lambda t: t[:, :, :-1].contiguous()),
        r"0.w13_weight_packed: expected shape \(128, 12\).*found \(128, 11\)",
    ),
    (
        W4A16,
        with_tensor("w2_weight_packed", lambda t: t[:, 1:].contiguous()),
        r"0.w2_weight_packed: expected shape \(96, 8\).*found \(95, 8\)",
    ),
    (
        W4A16,
        with_tensor("w2_weight_scale", lambda t: t[:, :, :1].contiguous()),
        r"0.w2_weight_scale: expected shape \(96, 2\).*found \(96, 1\)",
    ),
    (
        W4A16,
        with_tensor("w13_weight_scale", lambda t: t.float()),
        "0.w13_weight_scale: expected dtype torch.bfloat16, found torch.float32",
    ),
    (
        Format("WNA16", 4, 32, True),
        with_tensor("w13_weight_zero_point", lambda t: t[:, 1:].contiguous()),
        r"0.w13_weight_zero_point: expected shape \(16, 3\).*found \(15, 3\)",
    ),
    (
        FORMATS[-1],
        with_tensor("w13_weight", lambda t: t.int()),
        "0.w13_weight: expected ",
    ),
]


@pytest.mark.parametrize(("form", "spoil", "message"), DAMAGED)
def test_damaged_tensors_are_refused_by_name(form, spoil, message):
    case = loaded(form)
    spoil(case.layer)
    with pytest.raises(ValueError, match=rf"{PREFIX}, expert {message}"):
        case.method.process_weights_after_loading(case.layer)


@pytest.mark.parametrize("product", ["w13", "w2"])
def test_nothing_is_replaced_when_a_tensor_is_damaged(product):
    """The layer stays as it was loaded, whichever product the tensor is of."""
    case = loaded(W4A16)
    with_value(f"{product}_weight_scale", 1, torch.nan)(case.layer)
    before = {name: id(param) for name, param in case.layer.named_parameters()}
    with pytest.raises(ValueError, match=f"{product}_weight_scale"):
        case.method.process_weights_after_loading(case.layer)
    assert {name: id(param) for name, param in case.layer.named_parameters()} == before


def test_dummy_weights_are_made_four_bits():
    case = loaded(W4A8)
    for product in ("w13", "w2"):
        getattr(case.layer, f"{product}_weight").data.random_(-128, 128)
    case.kernel.settle_dummy(case.layer)
    case.method.process_weights_after_loading(case.layer)
    y = case.method.apply(case.layer, *routing(3, torch.bfloat16), None, None)
    assert bool(y.isfinite().all())
