# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the converter: bounds of its errors, exact groups, clamps, and the library."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_plugin_tm.quantization.convert import rounding as r
from vllm_plugin_tm.quantization.convert.rounding import Rounding
from vllm_plugin_tm.quantization.support_matrix import CHANNEL

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
N, K = 16, 256


def weights(kind: str, dtype: torch.dtype, rows: int = N) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(rows, K, generator=generator) * 0.02
    if kind == "shifted":
        w += 0.05  # every weight of most groups above zero: zero points meet their clamp
    elif kind == "one-hot":
        w = torch.zeros(rows, K)
        w[torch.arange(rows), torch.randint(K, (rows,), generator=generator)] = 0.3
    elif kind == "outlier":
        w[:, 7] *= 50
    elif kind == "negative":
        w = -w.abs()
    return w.to(dtype)


def dequantized(w: torch.Tensor, rounding: Rounding) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 weights, and the size of each weight's step."""
    codes, scale, zero = r.quantize_int(w, rounding, w.dtype)
    assert codes.dtype == torch.int8
    assert scale.dtype == w.dtype
    assert int(codes.min()) >= rounding.low
    assert int(codes.max()) <= rounding.high
    size = w.shape[1] // scale.shape[1]
    steps = scale.double().repeat_interleave(size, 1)
    values = codes.double()
    if zero is not None:
        assert int(zero.min()) >= rounding.low
        assert int(zero.max()) <= rounding.high
        values -= zero.double().repeat_interleave(size, 1)
    assert (zero is None) == rounding.symmetric
    return values * steps, steps.abs()


def clipped(w: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    codes, _, _ = r.quantize_int(w, rounding, w.dtype)
    return (codes == rounding.low) | (codes == rounding.high)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "shifted", "one-hot", "outlier", "negative"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, CHANNEL])
@pytest.mark.parametrize(
    ("symmetric", "method"), [(True, "rtn"), (False, "rtn"), (True, "signed"), (True, "mse"),
                              (False, "mse")]
)  # fmt: skip
def test_where_nothing_clips_the_error_is_half_a_step(
    dtype, kind, bits, group_size, symmetric, method
):
    """The bound is the arithmetic's own: the nearest code to the scale as it is stored."""
    w = weights(kind, dtype)
    rounding = Rounding(bits, group_size, symmetric, method)
    values, steps = dequantized(w, rounding)
    inside = ~clipped(w, rounding)
    error = (values - w.double()).abs()
    # float32 of the quotient: codes up to 2**7 have 2**-17 of a step.
    assert (error[inside] <= steps[inside] * (0.5 + 2.0**-15)).all()
    # What clips (rtn: the end above zero is half a step short; mse: by choice) does so within the
    # range that was looked at.
    assert (error <= steps * (1.01 if method in ("rtn", "signed") else 8 * (1 << bits))).all()


@pytest.mark.parametrize("method", ["rtn", "signed", "mse"])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 1e-3, -7.25, 3.0e-5])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_of_one_value_are_exact(method, value, symmetric, dtype):
    if method == "signed" and not symmetric:
        pytest.skip("signed is symmetric")
    w = torch.full((8, 64), value).to(dtype)
    values, _ = dequantized(w, Rounding(4, 32, symmetric, method))
    assert torch.equal(values, w.double())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 128, CHANNEL])
@pytest.mark.parametrize("kind", ["normal", "shifted", "one-hot", "outlier"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_mean_square_error_is_no_more_than_the_librarys(
    symmetric, bits, group_size, kind, dtype
):
    # Many rows: whose rounding of a single group's zero point is luckier is chance.
    w = weights(kind, dtype, rows=512)
    ours, _ = dequantized(w, Rounding(bits, group_size, symmetric))
    grouped = {"strategy": "channel"}
    if group_size != CHANNEL:
        grouped = {"strategy": "group", "group_size": group_size}
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, **grouped)
    groups = w.unflatten(1, (-1, K if group_size == CHANNEL else group_size))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    scale = scale.to(dtype)
    codes = quantize(w, scale, zero, args, dtype=torch.int8)
    theirs = dequantize(codes, scale.double(), zero, dtype=torch.float64)
    mse = ((ours - w.double()) ** 2).mean()
    assert mse <= ((theirs - w.double()) ** 2).mean() * (1 + 1e-9)


@pytest.mark.parametrize("kind", ["normal", "shifted", "outlier", "negative"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_search_is_never_worse_than_what_it_starts_from(kind, bits):
    w = weights(kind, torch.bfloat16)

    def mse(method: str, symmetric: bool) -> float:
        values, _ = dequantized(w, Rounding(bits, 32, symmetric, method))
        return float(((values - w.double()) ** 2).mean())

    assert mse("mse", True) <= min(mse("rtn", True), mse("signed", True)) * (1 + 1e-6)
    assert mse("mse", False) <= mse("rtn", False) * (1 + 1e-6)


def test_weighing_by_the_square_moves_the_error_to_small_weights():
    w = weights("normal", torch.bfloat16)
    plain, _ = dequantized(w, Rounding(4, 32, True, "mse"))
    weighed, _ = dequantized(w, Rounding(4, 32, True, "mse", "square"))
    importance = w.double() ** 2

    def weighted(values: torch.Tensor) -> float:
        return float((importance * (values - w.double()) ** 2).sum())

    assert weighted(weighed) < weighted(plain)


def test_signed_reaches_the_extreme_exactly_on_either_side():
    w = torch.tensor([[0.5, -0.1, 0.2, 0.0] * 8, [-0.5, 0.1, 0.2, 0.0] * 8]).bfloat16()
    codes, scale, _ = r.quantize_int(w, Rounding(4, 32, True, "signed"), torch.bfloat16)
    assert scale.flatten().tolist() == [-0.0625, 0.0625]
    assert (codes[:, 0] == -8).all()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    cut=st.integers(1, 39),
    seed=st.integers(0, 10**6),
    method=st.sampled_from(["rtn", "signed", "mse"]),
)
def test_a_rows_bits_do_not_depend_on_its_neighbours(rows, cut, seed, method):
    w = torch.randn(rows, 96, generator=torch.Generator().manual_seed(seed)).bfloat16()
    rounding = Rounding(4, 32, True, method)
    whole = r.quantize_int(w, rounding, w.dtype)
    cut = min(cut, rows)
    parts = [r.quantize_int(part, rounding, w.dtype) for part in (w[:cut], w[cut:]) if len(part)]
    for index in (0, 1):
        assert torch.equal(whole[index], torch.cat([part[index] for part in parts]))


def test_weights_too_small_for_the_scale_are_zero():
    w = torch.full((1, 32), 6e-8).half()
    w[0, 0] = 1.2e-7  # not of one value, and a fifteenth of it is no float16
    values, _ = dequantized(w, Rounding(4, 32))
    assert torch.equal(values, torch.zeros_like(values))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_rows_use_the_whole_range(dtype):
    w = weights("normal", dtype)
    w[3] = 0
    codes, scale = r.quantize_fp8(w, dtype)
    assert codes.dtype == torch.float8_e4m3fn
    back = codes.double() * scale.double()
    assert torch.equal(back[3], torch.zeros(K, dtype=torch.float64))
    assert (codes.float().abs().amax(1)[[0, 1, 2]] >= 416).all()
    # Three bits behind the leading one: 2**-4 of the value, below it 2**-10 of a step.
    bound = w.double().abs() * 2.0**-4 + scale.double() * 2.0**-10
    assert ((back - w.double()).abs() <= bound * 1.001).all()


@pytest.mark.parametrize(("n", "k"), [(128, 128), (130, 200), (256, 64), (1, 1)])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_fp8_blocks_may_be_ragged_and_empty(n, k, power_of_two):
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(1)).bfloat16()
    w[:128, :128] *= 100
    if n > 128:
        w[128:] = 0
    codes, scale = r.quantize_fp8_block(w, 128, torch.float32, power_of_two=power_of_two)
    assert scale.shape == (-(-n // 128), -(-k // 128))
    if power_of_two:
        mantissa, _ = torch.frexp(scale)
        assert (mantissa == 0.5).all()
    back = r.dequantize_fp8_block(codes, scale, 128).double()
    assert torch.isfinite(back).all()
    steps = scale.double().repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    assert ((back - w.double()).abs() <= w.double().abs() * 2.0**-4 + steps * 2.0**-10).all()


def test_a_power_of_two_is_left_alone_and_others_are_rounded_up():
    w = torch.zeros(128, 256)
    w[0, 0], w[0, 128] = 448 * 0.25, 448 * 0.26
    _, scale = r.quantize_fp8_block(w, 128, torch.float32, power_of_two=True)
    assert scale.flatten().tolist() == [0.25, 0.5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_power_of_two_never_clips(dtype):
    """Not even where the scale's own type would round it down to one before."""
    w = torch.zeros(4, 128)
    w[0, 0], w[1, 3], w[2, 5] = 448, -449, 448 * 0.2505
    rows, scale = r.quantize_fp8(w, dtype, power_of_two=True)
    assert scale.flatten().tolist() == [1, 2, 0.5, 1]
    assert (rows.float() * scale.float()).flatten().abs().amax() == 448
    _, scale = r.quantize_fp8_block(w, 128, dtype, power_of_two=True)
    assert scale.tolist() == [[2]]


def test_parts_of_rows_have_the_scales_of_whole_ones():
    w = weights("normal", torch.bfloat16)
    codes, scale = r.quantize_fp8(w, w.dtype)
    low, high = (limit(w.float(), -1, keepdim=True) for limit in (torch.amin, torch.amax))
    left, right = w.chunk(2, -1)
    parts = [r.quantize_fp8(part, w.dtype, lambda *_: (low, high)) for part in (left, right)]
    assert all(torch.equal(part[1], scale) for part in parts)
    joined = torch.cat([part[0] for part in parts], -1)
    assert torch.equal(joined.view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_first_weight_that_is_no_number_is_found(bad):
    w = weights("normal", torch.bfloat16)
    r.check_finite(w)
    w[5, 9] = bad
    w[7, 1] = bad
    with pytest.raises(r.NotFiniteError) as found:
        r.check_finite(w)
    assert (found.value.row, found.value.column) == (5, 9)
    assert str(found.value.value) == str(bad)
    assert f"m.weight is {bad} at output row 105, input 9;" in found.value.text("m.weight", 100)


def test_sums_beyond_the_type_are_no_damage():
    r.check_finite(torch.full((4, 64), 3e38))
