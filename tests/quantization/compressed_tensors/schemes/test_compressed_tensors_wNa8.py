# SPDX-License-Identifier: Apache-2.0
"""Packed weights whose checkpoints quantize activations too, and the opt-in mode that does it for
W4A16: which product runs, that it is the right one, and what the layer table says."""

import pytest
import torch

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

from scheme_cases import activations, assert_close, disk, pack_dense, processed

from vllm_plugin_tm import envs, layer_table
from vllm_plugin_tm.kernels import reference, reference_int8

pytestmark = pytest.mark.usefixtures("patched")
N, K = 48, 128
INT8_MODE = envs.INT8_ACTIVATIONS.name


def x_of(dtype=torch.bfloat16, k=K):
    return torch.randn(2, 3, k, generator=torch.Generator().manual_seed(5)).to(dtype)


def assert_w4a8(kernel, layer, data, bits, x_groups, dtype=torch.bfloat16):
    x = x_of(dtype)
    zeros = None if data.zeros is None else pack_dense(data.zeros.t(), bits).t().contiguous()
    arguments = (x, data.codes, data.scale, zeros, data.bias, x_groups, bits)
    assert_close(
        kernel.apply_weights(layer, x, data.bias),
        reference_int8.w4a8_linear(*arguments),
        reference_int8.w4a8_tolerance(*arguments),
    )


def assert_kept(kernel, layer, data, bits):
    x = x_of()
    zeros = None if data.zeros is None else pack_dense(data.zeros.t(), bits).t().contiguous()
    arguments = (x, data.codes, data.scale, zeros, data.bias, bits)
    assert_close(
        kernel.apply_weights(layer, x, data.bias),
        reference.w4a16_linear(*arguments),
        reference.w4a16_tolerance(*arguments),
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_token_activations_over_four_bits_or_fewer(bits, asymmetric, group):
    data = disk(64, K, group, bits, asymmetric)
    kernel, layer = processed(
        "WNA8Int", data, bits=bits, group=group, asymmetric=asymmetric, x_quant=activations()
    )
    assert kernel.note == "int8 activations, per token"
    assert_w4a8(kernel, layer, data, bits, x_groups=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_group_activations_that_go_with_the_weights(dtype):
    data = disk(N, K, 32, dtype=dtype)
    kernel, layer = processed(
        "WNA8Int", data, dtype=dtype, group=32, x_quant=activations("group", 32)
    )
    assert kernel.note == "int8 activations, per token and group"
    assert_w4a8(kernel, layer, data, 4, x_groups=True, dtype=dtype)


def test_eight_bit_channel_weights_are_w8a8():
    data = disk(N, 130, bits=8)
    kernel, layer = processed("WNA8Int", data, bits=8, x_quant=activations())
    assert kernel.plan.product == "w8a8"
    assert kernel.note == "int8 activations, per token"
    x = x_of(k=130)
    arguments = (x, data.codes, data.scale.float(), data.bias)
    assert_close(
        kernel.apply_weights(layer, x, data.bias),
        reference_int8.w8a8_linear(*arguments),
        reference_int8.w8a8_tolerance(*arguments),
    )


@pytest.mark.parametrize(
    ("options", "x_quant", "words"),
    [
        ({"group": 32}, activations("group", 64), "per group of size 64 with weight groups of 32"),
        ({"group": -1}, activations("group", 64), "per group of size 64 with weight groups of -1"),
        ({"group": 32, "bits": 8}, activations(), "w8a8: group size (32) not supported"),
        ({"bits": 8, "asymmetric": True}, activations(), "weight type (uint8) not supported"),
        ({"bits": 6}, activations(), "weight type (uint6b32) not supported"),
        ({"bits": 8}, activations("group", 64), "per group of size 64"),
    ],
)
def test_activations_that_no_kernel_rounds_so_are_kept_and_the_table_says_it(
    options, x_quant, words
):
    bits = options.get("bits", 4)
    asymmetric = options.get("asymmetric", False)
    data = disk(64, K, options.get("group", -1), bits, asymmetric)
    kernel, layer = processed("WNA8Int", data, x_quant=x_quant, **options)
    assert kernel.note.startswith("activations are not quantized (nor does upstream on a CPU): ")
    assert words in kernel.note
    assert_kept(kernel, layer, data, bits)


def test_schemes_that_the_user_keeps_from_us_are_not_run(monkeypatch):
    monkeypatch.setenv(envs.TAKEN_SCHEMES.name, "w4a16")
    data = disk(N, K, 32)
    kernel, layer = processed("WNA8Int", data, group=32, x_quant=activations())
    assert "w4a8 is not among the schemes to take ('w4a16',)" in kernel.note
    assert_kept(kernel, layer, data, 4)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, -1])
def test_the_opt_in_mode_rounds_w4a16_by_token_and_group(monkeypatch, bits, asymmetric, group):
    monkeypatch.setenv(INT8_MODE, "1")
    data = disk(64, K, group, bits, asymmetric)
    kernel, layer = processed("WNA16", data, bits=bits, group=group, asymmetric=asymmetric)
    assert kernel.note == f"int8 activations, per token and group: {INT8_MODE}=1"
    assert_w4a8(kernel, layer, data, bits, x_groups=True)


@pytest.mark.parametrize(("bits", "group"), [(4, 8), (4, 16), (8, 32), (5, -1)])
def test_the_opt_in_mode_leaves_short_groups_and_wide_weights(monkeypatch, bits, group):
    monkeypatch.setenv(INT8_MODE, "1")
    data = disk(N, K, group, bits)
    kernel, layer = processed("WNA16", data, bits=bits, group=group)
    assert kernel.note == ""
    assert_kept(kernel, layer, data, bits)


def test_the_opt_in_mode_is_off_by_default_and_needs_no_scheme_of_its_own(monkeypatch):
    data = disk(N, K, 32)
    assert processed("WNA16", data, group=32)[0].note == ""
    monkeypatch.setenv(INT8_MODE, "1")
    monkeypatch.setenv(envs.TAKEN_SCHEMES.name, "w4a16")
    assert INT8_MODE in processed("WNA16", data, group=32)[0].note


def test_what_the_checkpoint_asks_for_goes_before_the_opt_in_mode(monkeypatch):
    monkeypatch.setenv(INT8_MODE, "1")
    data = disk(N, K, 32)
    kernel, layer = processed("WNA8Int", data, group=32, x_quant=activations())
    assert kernel.note == "int8 activations, per token"
    assert_w4a8(kernel, layer, data, 4, x_groups=False)


def test_the_layer_table_shows_the_note():
    class Method(layer_table.QuantizeMethodBase):
        create_weights = apply = None

    _, layer = processed("WNA8Int", disk(N, K, 32), group=32, x_quant=activations())
    layer.quant_method = Method()
    model = torch.nn.Module()
    model.block = layer
    (row,) = layer_table.collect(model)
    assert row.note == "int8 activations, per token"
    assert (row.scheme, row.kernel) == ("CompressedTensorsWNA8Int", "TMWNA16LinearKernel")
    assert (row.isa, row.group_size) == (ops.get_isa(), 32)
