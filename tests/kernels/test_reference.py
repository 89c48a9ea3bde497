# SPDX-License-Identifier: Apache-2.0
"""The oracle itself: against the compressed-tensors library, and its bounds. Runs no kernel."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from linear_cases import MODES, W8A8, X_SCALE, X_ZERO_POINT, expected, make_layer, make_x, pack_bits

from vllm_plugin_tm.kernels import reference, reference_int8


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 10, 11, 32, 99])
def test_unpacking_is_the_inverse_of_packing_bit_by_bit(bits: int, count: int) -> None:
    most = 2 ** (bits - 1)
    codes = torch.randint(-most, most, (7, count), generator=torch.Generator().manual_seed(count))
    packed = pack_bits(codes.to(torch.int8), bits)
    assert packed.shape == (7, -(-count * bits // 32))
    assert torch.equal(reference.unpack(packed, bits, count), codes.to(torch.int8))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_streams_of_whole_codes_are_the_librarys(bits: int) -> None:
    """Where words hold whole codes, a stream of bits is what the library packs."""
    most = 2 ** (bits - 1)
    codes = torch.randint(-most, most, (5, 99), generator=torch.Generator().manual_seed(0))
    packed = pack_bits(codes.to(torch.int8), bits)
    assert torch.equal(packed, pack_to_int32(codes.to(torch.int8), bits))
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes.to(torch.int8))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize(("group", "k"), [(32, 96), (128, 256), (-1, 100)])
def test_dequantization_is_the_librarys(group: int, k: int, asymmetric: bool, bits: int) -> None:
    """Exactly: the library computes in float32, where these products are exact too."""
    n, groups = 24, 1 if group == -1 else k // group
    generator = torch.Generator().manual_seed(0)
    most = 2 ** (bits - 1)
    # Powers of two, so that the library's own rounding, in the scale's dtype, is none.
    scale = 2.0 ** torch.randint(-4, 4, (n, groups), generator=generator)
    zeros = torch.randint(-most, most, (n, groups), generator=generator).to(torch.int8)
    codes = torch.randint(-most, most, (n, k), generator=generator).to(torch.int8)
    disk = {
        "weight_packed": pack_to_int32(codes, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([n, k]),
    }
    if asymmetric:
        disk["weight_zero_point"] = pack_to_int32(zeros, bits, packed_dim=0).contiguous()
    arguments = QuantizationArgs(
        num_bits=bits,
        symmetric=not asymmetric,
        strategy="channel" if group == -1 else "group",
        group_size=None if group == -1 else group,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    library = compressor.decompress(dict(disk), scheme)["weight"]
    for weight in (disk["weight_packed"], codes):
        ours = reference.dequantize(weight, scale, disk.get("weight_zero_point"), k, bits)
        assert torch.equal(ours, library.double())


def _rows() -> torch.Tensor:
    """Normal rows of many sizes, one-sided ones, and rows of halves, where the scale is 1."""
    normal = make_x(200, 50, torch.float32) * torch.logspace(-6, 6, 200).unsqueeze(1)
    halves = torch.arange(-127.5, 127.5, 5.2).round() + 0.5
    halves = halves.clamp(-127.5, 127.5).repeat(2, 1)[:, -50:]
    halves[:, 0], halves[:, 1] = -127.5, 127.5
    pad = torch.zeros(2, 50 - halves.shape[1])
    return torch.cat((normal, normal.abs(), -normal.abs(), torch.cat((halves, pad), dim=1)))


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_activations_are_rounded_as_the_library_does(symmetric: bool) -> None:
    """Scales, zero points and codes, each bit for bit."""
    x = _rows()
    args = QuantizationArgs(num_bits=8, symmetric=symmetric, strategy="token", dynamic=True)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale, zero = calculate_qparams(low, high, args)
    ours = reference_int8.quantize_x(x, symmetric)
    assert torch.equal(ours.scale[:, 0], scale)
    assert torch.equal(ours.zero_point[:, 0], zero.float())
    assert torch.equal(ours.codes[:, 0], quantize(x, scale, zero, args))


@pytest.mark.parametrize("zero", [None, -128, X_ZERO_POINT, 127])
def test_static_activations_are_rounded_as_the_library_does(zero: int | None) -> None:
    x, scale = _rows(), torch.tensor([X_SCALE])
    point = None if zero is None else torch.tensor([zero], dtype=torch.int32)
    args = QuantizationArgs(num_bits=8, symmetric=zero is None, strategy="tensor")
    ours = reference_int8.quantize_x_static(x, scale, point)
    assert torch.equal(ours.codes[:, 0], quantize(x, scale, point, args))


def test_zeros_and_what_is_not_finite() -> None:
    """A row of zeros stays zero; a row with an infinity or NaN has no finite result."""
    x = torch.zeros(4, 8)
    x[1, 3], x[2, 0], x[3, 7] = float("inf"), float("-inf"), float("nan")
    weight = torch.ones(2, 8, dtype=torch.int8)
    for symmetric in (True, False):
        y = reference_int8.w8a8_linear(x, weight, torch.ones(2, 1), x_symmetric=symmetric)
        assert torch.equal(y[0], torch.zeros(2, dtype=torch.float64))
        assert not y[1:].isfinite().any()


def test_bounds_hold_for_float32_and_refuse_one_percent() -> None:
    """torch's float32 product is inside of the bound, one with scales 1 % off is far outside."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 1024, generator=generator)
    codes = torch.randint(-(2**31), 2**31 - 1, (64, 128), generator=generator).int()
    scale = torch.randn(64, 8, generator=generator)
    weight = reference.dequantize(codes, scale, None, 1024)
    want = reference.w4a16_linear(x, codes, scale)
    allowed = reference.w4a16_tolerance(x, codes, scale)
    assert torch.equal(want, x.double() @ weight.T)
    assert (((x @ weight.float().T).double() - want).abs() <= allowed).all()
    assert ((1.01 * want - want).abs() > allowed).double().mean() > 0.95


@pytest.mark.parametrize("mode", MODES)
def test_no_tolerance_reaches_one_percent(mode: str) -> None:
    """Whatever the mode and dtype, most results would show a scale that is 1 % off."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        layer = make_layer(mode, 64, 1024, 128, dtype, asymmetric=True, bias=True)
        x = make_x(9, 1024, dtype)
        right, wrong = expected(layer, x), expected(layer, x, scale_factor=1.01)
        outside = (right.y - wrong.y).abs() > right.allowed
        assert outside.double().mean() > 0.5


@pytest.mark.parametrize(
    "mode", [mode for mode in MODES if mode in W8A8 or mode.startswith("w4a8")]
)
def test_the_integer_oracles_are_fake_quantization(mode: str) -> None:
    """Sums of integers with scales afterwards are the product of both sides as real numbers."""
    layer = make_layer(mode, 24, 96, 32, torch.float32, asymmetric=True, bias=True)
    x = make_x(7, 96, torch.float32)
    weight = reference.dequantize(layer.codes, layer.scale, layer.zero_point, 96, layer.bits)
    if layer.x_scale is not None:
        rounded = reference_int8.quantize_x_static(x, layer.x_scale, layer.x_zero_point)
    else:
        groups = 3 if mode == "w4a8_groups" else 1
        rounded = reference_int8.quantize_x(x, mode != "w8a8_asym", groups)
    real = ((rounded.codes - rounded.zero_point).double() * rounded.scale.double()).flatten(1)
    want = real @ weight.T + layer.bias.double()
    # float64 sums of 96 products: far below any float32 step.
    torch.testing.assert_close(expected(layer, x).y, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("codes", "scale", "zero", "k", "name"),
    [
        ((4, 8), (4, 3), None, 64, "scale"),
        ((4, 8), (4,), None, 64, "scale"),
        ((4, 7), (4, 2), None, 64, "weight"),
        ((5, 8), (4, 2), None, 64, "weight"),
        ((4, 8), (4, 2), (4, 2), 64, "zero_point"),
    ],
)
def test_shapes_that_do_not_belong_together(
    codes: tuple[int, ...],
    scale: tuple[int, ...],
    zero: tuple[int, ...] | None,
    k: int,
    name: str,
) -> None:
    """A wrong shape is named, with what was expected and what was given."""
    with pytest.raises(ValueError, match=rf"{name}: expected .*, got \["):
        reference.dequantize(
            torch.zeros(codes, dtype=torch.int32),
            torch.ones(scale),
            None if zero is None else torch.zeros(zero, dtype=torch.int32),
            k,
        )
