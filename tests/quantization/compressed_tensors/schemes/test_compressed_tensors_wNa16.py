# SPDX-License-Identifier: Apache-2.0
"""TMWNA16LinearKernel: every parameter order it may meet, against the oracle; every refusal."""

import gc
import weakref

import pytest
import torch

from vllm_plugin_tm.kernels import ops, reference

pytest.importorskip("vllm")
from scheme_cases import PREFIX, disk, pack_dense, parameter
from vllm.model_executor.kernels.linear import MPLinearLayerConfig
from vllm.scalar_type import scalar_types

from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_wNa16 import (
    TMWNA16LinearKernel,
)

pytestmark = pytest.mark.skipif(not ops.is_available(), reason="the extension is not built")

N, K, GROUP = 48, 128, 32
NAMES = ("weight_packed", "weight_scale", "weight_zero_point")


def config(
    n=N, k=K, group=GROUP, asymmetric=False, dtype=torch.bfloat16, full_k=None, bits=4, **fields
):
    biased = f"uint{bits}b{1 << (bits - 1)}"
    values = {
        "full_weight_shape": (full_k or k, n),
        "partition_weight_shape": (k, n),
        "weight_type": getattr(scalar_types, f"uint{bits}" if asymmetric else biased),
        "act_type": dtype,
        "group_size": group,
        "zero_points": asymmetric,
    }
    return MPLinearLayerConfig(**(values | fields))


def disk_tensors(n, k, group, asymmetric, dtype, seed=0, bits=4):
    """Codes, scales and zero points of a checkpoint in compressed-tensors order."""
    data = disk(n, k, group, bits, asymmetric, dtype, seed)
    zeros = pack_dense(data.zeros.t(), bits).t().contiguous() if asymmetric else None
    return pack_dense(data.codes, bits), data.scale, zeros


def layer_in_order(order, codes, scale, zeros):
    """A layer whose parameters say that they are in `order`, as upstream's loaders leave them."""
    layer = torch.nn.Module()
    layer.prefix = PREFIX
    if order == "compressed-tensors":
        layer.weight_packed = parameter(codes.clone(), input_dim=1, output_dim=0, packed_dim=1)
        layer.weight_scale = parameter(scale.clone(), input_dim=1, output_dim=0)
    else:
        layer.weight_packed = parameter(
            codes.t().contiguous(), input_dim=0, output_dim=1, packed_dim=0
        )
        layer.weight_scale = parameter(scale.t().contiguous(), input_dim=0, output_dim=1)
    if zeros is None:
        return layer
    if order == "GPTQ":
        layer.weight_zero_point = parameter(
            zeros.t().contiguous(), input_dim=0, output_dim=1, packed_dim=1
        )
    else:  # upstream leaves the zero points of AWQ in compressed-tensors order
        layer.weight_zero_point = parameter(zeros.clone(), input_dim=1, output_dim=0, packed_dim=0)
    return layer


def prepared(
    order="compressed-tensors", n=N, k=K, group=GROUP, asymmetric=False, dtype=None, seed=0, bits=4
):
    dtype = dtype or torch.bfloat16
    tensors = disk_tensors(n, k, group, asymmetric, dtype, seed, bits)
    layer = layer_in_order(order, *tensors)
    kernel = TMWNA16LinearKernel(config(n, k, group, asymmetric, dtype, bits=bits), *NAMES)
    return kernel, layer, tensors


def assert_right(kernel, layer, tensors, x, bias=None, bits=4):
    y = kernel.apply_weights(layer, x, bias)
    want = reference.w4a16_linear(x, *tensors, bias, bits)
    allowed = reference.w4a16_tolerance(x, *tensors, bias, bits)
    assert y.dtype == x.dtype
    assert y.shape == want.shape
    assert bool(((y.double() - want).abs() <= allowed).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_width_gives_the_right_product(bits, asymmetric, group, dtype):
    kernel, layer, tensors = prepared(group=group, asymmetric=asymmetric, dtype=dtype, bits=bits)
    kernel.process_weights_after_loading(layer)
    assert kernel.note == ""
    assert kernel.group_size == (-1 if group == K else group)
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(5, K, generator=generator).to(dtype)
    bias = torch.randn(N, generator=generator).to(dtype)
    assert_right(kernel, layer, tensors, x, bias, bits)


@pytest.mark.parametrize(("bits", "group"), [(2, 8), (3, 24), (5, 4), (6, 12), (7, 20), (8, 4)])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_groups_need_not_end_with_a_word_of_the_checkpoint(bits, group, asymmetric):
    kernel, layer, tensors = prepared(k=group * 7, group=group, asymmetric=asymmetric, bits=bits)
    kernel.process_weights_after_loading(layer)
    assert_right(kernel, layer, tensors, torch.randn(3, group * 7).to(torch.bfloat16), bits=bits)


@pytest.mark.parametrize("order", ["compressed-tensors", "GPTQ", "AWQ"])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_order_gives_the_right_product(order, asymmetric, group, dtype):
    kernel, layer, tensors = prepared(order, group=group, asymmetric=asymmetric, dtype=dtype)
    kernel.process_weights_after_loading(layer)
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(2, 3, K, generator=generator).to(dtype)
    assert_right(kernel, layer, tensors, x, torch.randn(N, generator=generator).to(dtype))
    assert_right(kernel, layer, tensors, x[:, :0])


@pytest.mark.parametrize(("n", "k"), [(37, 101), (1, 8), (16, 20), (129, 64)])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_ragged_channel_shapes(n, k, asymmetric, bits):
    kernel, layer, tensors = prepared(n=n, k=k, group=-1, asymmetric=asymmetric, bits=bits)
    kernel.process_weights_after_loading(layer)
    assert_right(kernel, layer, tensors, torch.randn(5, k).to(torch.bfloat16), bits=bits)


@pytest.mark.parametrize("group", [32, -1])
def test_gptq_order_of_eight_bits(group):
    kernel, layer, tensors = prepared("GPTQ", group=group, bits=8)
    kernel.process_weights_after_loading(layer)
    assert_right(kernel, layer, tensors, torch.randn(5, K).to(torch.bfloat16), bits=8)


def test_group_that_spans_the_shard_is_channel():
    _, layer, tensors = prepared(group=-1)
    kernel = TMWNA16LinearKernel(config(group=K), *NAMES)
    kernel.process_weights_after_loading(layer)
    assert_right(kernel, layer, tensors, torch.randn(2, K).to(torch.bfloat16))


def test_rows_that_pad_the_output_to_whole_words_are_dropped():
    """Quark fills N up to a multiple of 8 and hands all of it over."""
    n, padded = 45, 48
    tensors = disk_tensors(padded, K, GROUP, True, torch.bfloat16)
    layer = layer_in_order("AWQ", *tensors)
    kernel = TMWNA16LinearKernel(config(n=n, asymmetric=True), *NAMES)
    kernel.process_weights_after_loading(layer)
    x = torch.randn(4, K).to(torch.bfloat16)
    codes, scale, zeros = tensors
    assert_right(kernel, layer, (codes[:n], scale[:n], zeros), x)


def test_symmetric_layers_lose_the_zero_points_that_gptq_carries():
    kernel, layer, tensors = prepared("GPTQ")
    layer.weight_zero_point = parameter(torch.zeros(K // GROUP, N // 8, dtype=torch.int32))
    kernel.process_weights_after_loading(layer)
    assert layer.weight_zero_point is None
    assert_right(kernel, layer, tensors, torch.randn(2, K).to(torch.bfloat16))


@pytest.mark.parametrize("order", ["compressed-tensors", "GPTQ"])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_new_values_give_the_same_parameters_anew(order, asymmetric):
    """Reload: names, shapes and dtypes stay, so upstream may copy into the old tensors."""
    kernel, layer, _ = prepared(order, asymmetric=asymmetric, seed=1)
    kernel.process_weights_after_loading(layer)
    first = {name: (p.shape, p.dtype) for name, p in layer.named_parameters()}
    old = dict(layer.named_parameters())

    _, second, tensors = prepared(order, asymmetric=asymmetric, seed=2)
    kernel.process_weights_after_loading(second)
    assert {name: (p.shape, p.dtype) for name, p in second.named_parameters()} == first
    for name, param in old.items():
        param.data.copy_(getattr(second, name))
    assert_right(kernel, layer, tensors, torch.randn(3, K).to(torch.bfloat16))


def test_disk_tensors_are_freed_and_resident_bytes_are_bounded():
    kernel, layer, tensors = prepared(n=64, k=512, asymmetric=True)
    disk_bytes = sum(t.nbytes for t in tensors)
    old = [weakref.ref(param) for param in layer.parameters()]
    kernel.process_weights_after_loading(layer)
    gc.collect()
    assert [ref() for ref in old] == [None, None, None]
    assert sum(param.nbytes for param in layer.parameters()) <= 1.05 * disk_bytes
    assert not any(isinstance(value, torch.Tensor) for value in vars(kernel).values())


def test_weight_loaders_survive():
    kernel, layer, _ = prepared(asymmetric=True)
    for name in NAMES:
        getattr(layer, name).weight_loader = print
    kernel.process_weights_after_loading(layer)
    assert all(getattr(layer, name).weight_loader is print for name in NAMES)


def spoil_scale(value, row=5, group=2):
    def spoil(layer):
        layer.weight_scale.data[row, group] = value

    return spoil


def set_data(name, function):
    def spoil(layer):
        param = getattr(layer, name)
        new = parameter(function(param.data), **vars(param))
        setattr(layer, name, new)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_scale(float("nan")), r"weight_scale: 1 of 192 .*nan at output row 5, group 2"),
        (spoil_scale(float("inf")), r"weight_scale: 1 of 192 .*inf at output row 5, group 2"),
        (spoil_scale(-float("inf")), r"weight_scale: 1 of 192 .*-inf at output row 5, group 2"),
        (set_data("weight_scale", lambda t: t[:, :3].clone()), r"weight_scale.*48, 4.*48, 3"),
        (set_data("weight_scale", lambda t: t.float()), r"weight_scale.*bfloat16.*float32"),
        (set_data("weight_packed", lambda t: t[:, :-1]), r"weight_packed.*48, 16.*48, 15"),
        (set_data("weight_packed", lambda t: t[:-8]), r"weight_packed.*48, 16.*40, 16"),
        (set_data("weight_packed", lambda t: t.long()), r"weight_packed.*int32.*int64"),
        (set_data("weight_packed", lambda t: t.flatten()), r"weight_packed.*2-D"),
        (set_data("weight_zero_point", lambda t: t[:, :1]), r"weight_zero_point.*6, 4.*6, 1"),
        (set_data("weight_zero_point", lambda t: t.float()), r"weight_zero_point.*int32"),
        (lambda layer: delattr(layer, "weight_zero_point"), r"weight_zero_point.*no such tensor"),
    ],
)
def test_damaged_tensors_are_refused_by_name(spoil, message):
    kernel, layer, _ = prepared(asymmetric=True)
    spoil(layer)
    with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp\.down_proj\." + message):
        kernel.process_weights_after_loading(layer)


def test_weights_packed_along_the_output_are_refused():
    kernel, layer, _ = prepared()
    layer.weight_packed.packed_dim = 0
    with pytest.raises(ValueError, match=r"down_proj\.weight_packed: packed along dimension 0"):
        kernel.process_weights_after_loading(layer)


def test_processing_twice_without_loading_is_refused():
    kernel, layer, _ = prepared()
    kernel.process_weights_after_loading(layer)
    with pytest.raises(ValueError, match="processed already"):
        kernel.process_weights_after_loading(layer)


def test_a_refused_layer_never_reaches_an_op(monkeypatch):
    """Validation comes before routing."""
    kernel, layer, _ = prepared()
    layer.weight_scale.data[0, 0] = float("nan")

    def called(*_):
        raise AssertionError("the packer ran")

    monkeypatch.setattr(torch.ops.vllm_plugin_tm, "w4a16_pack", called)
    with pytest.raises(ValueError, match="weight_scale"):
        kernel.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"weight_type": scalar_types.float8_e4m3fn}, "float8_e4m3fn"),
        ({"weight_type": scalar_types.int4}, "int4"),
        ({"dtype": torch.int8}, "int8"),
        ({"group": 20}, "20"),
        ({"group": 48}, "48"),
    ],
)
def test_other_formats_are_refused_with_a_reason(fields, word):
    ok, reason = TMWNA16LinearKernel.can_implement(config(**fields))
    assert not ok
    assert word in reason
    with pytest.raises(ValueError, match=word):
        TMWNA16LinearKernel(config(**fields), *NAMES)


def test_schemes_that_the_user_keeps_from_us_are_refused(monkeypatch):
    from vllm_plugin_tm import envs

    monkeypatch.setattr(envs, "schemes", tuple)
    ok, reason = TMWNA16LinearKernel.can_implement(config())
    assert not ok
    assert "w4a16" in reason


def test_older_vllm_with_activation_order_is_refused():
    class Older(MPLinearLayerConfig):
        has_g_idx = True

    ok, reason = TMWNA16LinearKernel.can_implement(Older(**vars(config())))
    assert not ok
    assert "g_idx" in reason
