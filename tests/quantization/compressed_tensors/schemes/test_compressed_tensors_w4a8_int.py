# SPDX-License-Identifier: Apache-2.0
"""TMW4A8IntLinearKernel: int-quantized weights against the oracle, freed bytes, refusals."""

import gc
import weakref

import pytest
import torch

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

from scheme_cases import PREFIX, assert_close, create, disk, load, make_scheme, processed

from vllm_plugin_tm import envs
from vllm_plugin_tm.kernels import reference, reference_int8

pytestmark = pytest.mark.usefixtures("patched")
N, K = 48, 128


def x_of(dtype, k=K):
    return torch.randn(5, k, generator=torch.Generator().manual_seed(5)).to(dtype)


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_right_product(group, dtype):
    data = disk(N, K, group, dtype=dtype)
    kernel, layer = processed("W4A8Int", data, group=group, dtype=dtype)
    assert type(kernel).__name__ == "TMW4A8IntLinearKernel"
    assert kernel.note == "int8 activations, per token"
    assert kernel.group_size == (-1 if group == K else group)
    x = x_of(dtype)
    for bias in (None, data.bias):
        arguments = (x, data.codes, data.scale, None, bias)
        assert_close(
            kernel.apply_weights(layer, x, bias),
            reference_int8.w4a8_linear(*arguments),
            reference_int8.w4a8_tolerance(*arguments),
        )


@pytest.mark.parametrize(("n", "k"), [(37, 100), (1, 8), (16, 21)])
def test_ragged_channel_shapes(n, k):
    data = disk(n, k)
    kernel, layer = processed("W4A8Int", data)
    x = x_of(torch.bfloat16, k)
    arguments = (x, data.codes, data.scale)
    assert_close(
        kernel.apply_weights(layer, x),
        reference_int8.w4a8_linear(*arguments),
        reference_int8.w4a8_tolerance(*arguments),
    )


def test_the_bytes_are_freed_and_half_a_byte_a_weight_stays():
    data = disk(64, 512, 64)
    scheme = make_scheme("W4A8Int", group=64)
    layer = create(scheme, (64,), 512)
    load(layer, "W4A8Int", 4, data, (64,))
    old = weakref.ref(layer.weight)
    assert layer.weight is layer.weight_packed
    scheme.process_weights_after_loading(layer)
    gc.collect()
    assert old() is None
    assert layer.weight is None
    held = sum(param.nbytes for param in layer.parameters())
    assert held <= 1.05 * (64 * 512 / 2 + data.scale.nbytes)


@pytest.mark.parametrize("value", [-9, 8, 127, -128])
def test_values_that_are_no_four_bits_are_refused_by_name(value):
    data = disk(N, K)
    data.codes[3, 7] = value
    with pytest.raises(ValueError, match=rf"{PREFIX}\.weight: values of .*{value}.*-8 to 7"):
        processed("W4A8Int", data)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers_are_refused_by_name(value):
    data = disk(N, K, 32)
    data.scale[5, 2] = value
    with pytest.raises(ValueError, match=rf"{PREFIX}\.weight_scale: 1 of 192 .*row 5, group 2"):
        processed("W4A8Int", data, group=32)


def test_asymmetric_activations_are_kept_and_the_table_says_it():
    data = disk(N, K, 32)
    kernel, layer = processed("W4A8Int", data, group=32, asymmetric=True)
    assert "activations are not quantized" in kernel.note
    assert "symmetric=False" in kernel.note
    x = x_of(torch.bfloat16)
    arguments = (x, data.codes, data.scale)
    assert_close(
        kernel.apply_weights(layer, x),
        reference.w4a16_linear(*arguments),
        reference.w4a16_tolerance(*arguments),
    )


def test_dummy_weights_are_made_four_bits():
    scheme = make_scheme("W4A8Int", group=32)
    layer = create(scheme, (N,), K)
    layer.weight.data.random_(-128, 128)
    layer.weight_scale.data.fill_(0.01)
    scheme.kernel.settle_dummy(layer)
    scheme.process_weights_after_loading(layer)
    assert bool(scheme.kernel.apply_weights(layer, x_of(torch.bfloat16)).isfinite().all())


def test_without_the_scheme_the_layer_is_upstreams(monkeypatch):
    monkeypatch.setenv(envs.TAKEN_SCHEMES.name, "w4a16,w8a16,w8a8")
    scheme = make_scheme("W4A8Int", group=32)
    create(scheme, (N,), K)
    assert type(scheme.kernel).__name__ == "Dynamic4bitLinearKernel"
