# SPDX-License-Identifier: Apache-2.0
"""TMInt8ScaledMMLinearKernel: every combination of scales and activations against the oracle, fused
modules, static scales, refusals."""

import dataclasses

import pytest
import torch

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

from scheme_cases import PREFIX, assert_close, create, disk, load, make_scheme, processed

from vllm_plugin_tm import envs
from vllm_plugin_tm.kernels import reference_int8

pytestmark = pytest.mark.usefixtures("patched")
N, K = 48, 130


def w8a8_disk(n=N, k=K, static=False, asymmetric=False, x_scale=0.02, x_zero=-37, seed=0):
    data = disk(n, k, bits=8, dtype=torch.float32, seed=seed)
    return dataclasses.replace(
        data,
        x_scale=torch.tensor([x_scale]) if static else None,
        x_zero=torch.tensor([x_zero], dtype=torch.int8) if static and asymmetric else None,
    )


def x_of(dtype=torch.bfloat16, k=K):
    return torch.randn(2, 3, k, generator=torch.Generator().manual_seed(5)).to(dtype)


def assert_w8a8(kernel, layer, data, dtype=torch.bfloat16, symmetric=True, bias=None, scale=None):
    x = x_of(dtype, data.codes.shape[1])
    zero = None if data.x_zero is None else data.x_zero.int()
    scale = data.scale if scale is None else scale
    arguments = (x, data.codes, scale, bias, data.x_scale, zero, symmetric)
    y = kernel.apply_weights(layer, x, bias)
    assert y.dtype == dtype
    assert_close(
        y, reference_int8.w8a8_linear(*arguments), reference_int8.w8a8_tolerance(*arguments)
    )


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_right_product(static, asymmetric, dtype):
    data = w8a8_disk(static=static, asymmetric=asymmetric)
    kernel, layer = processed("W8A8Int8", data, static=static, asymmetric=asymmetric)
    assert type(kernel).__name__ == "TMInt8ScaledMMLinearKernel"
    how = "static" if static else "per token"
    zero = ", with zero point" if asymmetric else ""
    assert kernel.note == f"int8 activations, {how}{zero}"
    for bias in (None, data.bias.to(dtype)):
        assert_w8a8(kernel, layer, data, dtype, not asymmetric, bias)
    assert layer.azp_adj is None


@pytest.mark.parametrize(("n", "k"), [(1, 1), (37, 100), (16, 3), (129, 64)])
def test_ragged_shapes(n, k):
    data = w8a8_disk(n, k)
    kernel, layer = processed("W8A8Int8", data)
    assert_w8a8(kernel, layer, data)


@pytest.mark.parametrize("parts", [(48,), (16, 24, 8)])
@pytest.mark.parametrize("static", [False, True])
def test_one_scale_for_a_tensor_and_one_for_each_part(parts, static):
    data = w8a8_disk(static=static)
    scales = torch.tensor([0.011, -0.02, 0.007])[: len(parts)]
    scheme = make_scheme("W8A8Int8", static=static, channel=False)
    layer = create(scheme, parts, K)
    layer.weight.data.copy_(data.codes)
    for index, scale in enumerate(scales):
        layer.weight_scale.load_merged_column_weight(loaded_weight=scale, shard_id=index)
    if static:
        layer.input_scale.load_merged_column_weight(data.x_scale)
    scheme.process_weights_after_loading(layer)
    every = scales.repeat_interleave(torch.tensor(parts)).reshape(-1, 1)
    assert_w8a8(scheme.kernel, layer, data, scale=every)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_several_static_scales_become_one_that_holds_all_ranges(asymmetric):
    """As upstream's CPU kernel does it: what its formula gives is written out here."""
    data = w8a8_disk(static=True, asymmetric=asymmetric)
    scheme = make_scheme("W8A8Int8", static=True, asymmetric=asymmetric)
    layer = create(scheme, (24, 24), K)
    load(layer, "W8A8Int8", 8, dataclasses.replace(data, x_scale=None, x_zero=None), (24, 24))
    layer.input_scale.data = torch.tensor([0.02, 0.01])
    if asymmetric:
        layer.input_zero_point.data = torch.tensor([100, -128], dtype=torch.int8)
    scheme.process_weights_after_loading(layer)
    if asymmetric:
        # Ranges: 0.02 * (-228 .. 27) and 0.01 * (0 .. 255).
        low, high = 0.02 * -228, 0.01 * 255
        step = (high - low) / 255
        zero = torch.tensor([round(-128 - low / step)], dtype=torch.int32)
    else:
        step, zero = 0.02, None
    assert layer.input_scale.shape == (1,)
    assert float(layer.input_scale) == pytest.approx(step, rel=1e-6)
    data = dataclasses.replace(data, x_scale=layer.input_scale.data, x_zero=zero)
    assert_w8a8(scheme.kernel, layer, data)


@pytest.mark.parametrize("zero", [-128, 0, 127])
def test_outermost_zero_points(zero):
    data = w8a8_disk(static=True, asymmetric=True, x_zero=zero)
    kernel, layer = processed("W8A8Int8", data, static=True, asymmetric=True)
    assert layer.input_zero_point.dtype == torch.int32
    assert_w8a8(kernel, layer, data)


def with_scale(value):
    def spoil(layer):
        layer.weight_scale.data[5, 0] = value

    return spoil


def with_input(name, value):
    def spoil(layer):
        getattr(layer, name).data = value

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (with_scale(float("nan")), r"weight_scale: 1 of 48 .*nan at output row 5, group 0"),
        (with_scale(float("-inf")), r"weight_scale: 1 of 48 .*-inf at output row 5"),
        (with_input("weight_scale", torch.ones(47, 1)), r"weight_scale: expected 48.*\(47, 1\)"),
        (with_input("weight_scale", torch.ones(48, 1).half()), r"weight_scale.*float32.*float16"),
        (with_input("weight", torch.zeros(48, 130)), r"weight: expected dtype torch.int8.*float32"),
        (with_input("weight", torch.zeros(6240).char()), r"weight: expected a 2-D"),
        (with_input("input_scale", torch.tensor([0.0])), r"input_scale: expected positive.*0\.0"),
        (with_input("input_scale", torch.tensor([-1.0])), r"input_scale: expected positive.*-1\.0"),
        (with_input("input_scale", torch.tensor([torch.inf])), r"input_scale: .*finite.*inf"),
        (with_input("input_scale", torch.tensor([torch.nan])), r"input_scale: .*finite.*nan"),
        (with_input("input_scale", torch.ones(0)), r"input_scale: the layer has no such tensor"),
        (with_input("input_scale", torch.ones(1).half()), r"input_scale.*float32.*float16"),
        (with_input("input_zero_point", torch.tensor([128])), r"input_zero_point: .*127.*128"),
        (with_input("input_zero_point", torch.zeros(2).char()), r"input_zero_point: expected 1"),
        (with_input("input_zero_point", torch.zeros(1)), r"input_zero_point: .*integers.*float32"),
        (lambda layer: delattr(layer, "weight"), r"weight: the layer has no such tensor"),
        (lambda layer: delattr(layer, "weight_scale"), r"weight_scale: the layer has no such"),
    ],
)
def test_damaged_tensors_are_refused_by_name_and_nothing_is_replaced(spoil, message, monkeypatch):
    data = w8a8_disk(static=True, asymmetric=True)
    scheme = make_scheme("W8A8Int8", static=True, asymmetric=True)
    layer = create(scheme, (N,), K)
    load(layer, "W8A8Int8", 8, data, (N,))
    spoil(layer)
    before = dict(layer.named_parameters())
    with pytest.raises(ValueError, match=rf"{PREFIX}\.{message}"):
        scheme.process_weights_after_loading(layer)
    assert {k: id(p) for k, p in layer.named_parameters()} == {k: id(p) for k, p in before.items()}


def test_resident_bytes_are_bounded():
    data = w8a8_disk(64, 512)
    _, layer = processed("W8A8Int8", data)
    assert sum(p.nbytes for p in layer.parameters()) <= 1.05 * (64 * 512 + 64 * 4)


def test_dummy_scales_are_made_positive():
    scheme = make_scheme("W8A8Int8", static=True)
    layer = create(scheme, (N,), K)
    layer.weight_scale.data.fill_(1e-3)
    layer.input_scale.data.fill_(-1e-4)
    scheme.kernel.settle_dummy(layer)
    scheme.process_weights_after_loading(layer)
    assert float(layer.input_scale) == pytest.approx(1e-4)


def test_without_the_scheme_the_layer_is_upstreams(monkeypatch):
    monkeypatch.setenv(envs.TAKEN_SCHEMES.name, "w4a16,w8a16,w4a8")
    scheme = make_scheme("W8A8Int8")
    create(scheme, (N,), K)
    assert type(scheme.kernel).__name__ == "CPUInt8ScaledMMLinearKernel"
