# SPDX-License-Identifier: Apache-2.0
"""Experts value by value: the activations themselves, and what is at the edges of a dtype."""

import dataclasses

import pytest
import torch
from linear_cases import DTYPES, assert_right, make_x
from moe_cases import (
    ACTIVATIONS,
    SCHEMES,
    Activation,
    Call,
    MoeLayer,
    Shape,
    make_call,
    make_moe,
    times,
)

from vllm_plugin_tm.kernels import reference_moe
from vllm_plugin_tm.kernels.reference import FP32_UNIT
from vllm_plugin_tm.kernels.reference_moe import Experts

pytestmark = pytest.mark.usefixtures("extension")


def _one_expert(
    w13: torch.Tensor, w2: torch.Tensor, activation: Activation, dtype: torch.dtype
) -> MoeLayer:
    """An expert with these whole numbers as weights."""

    def experts(weights: torch.Tensor) -> Experts:
        codes = weights.to(torch.int8).unsqueeze(0)
        return Experts(codes, torch.ones(1, len(weights), 1, dtype=dtype), bits=8)

    sizes = (w13.shape[1], w2.shape[1])
    return MoeLayer("w8a16", *sizes, experts(w13), experts(w2), activation)


def _run(layer: MoeLayer, x: torch.Tensor) -> torch.Tensor:
    """All tokens to the one expert, with weight 1."""
    return layer(x, torch.ones(len(x), 1), torch.zeros(len(x), 1, dtype=torch.int32))


def _exponent_roundings(activation: Activation, g: torch.Tensor) -> torch.Tensor:
    """The argument v of the exponential that the activation takes of g, times the roundings on the
    way to v: each is worth |v| roundings of the result."""
    match activation.name.removesuffix("_no_mul"):
        case "swiglu":
            return activation.alpha * g.abs()
        case "gelu":  # z**2 with z = g * sqrt(1/2): constant and product count twice; a sum
            return 5 * g**2 / 2
        case "gelu_tanh":  # constant, product, product with (a square, a sum)
            return 5 * 1.6 * g.abs() * (1 + 0.044715 * g**2)
        case "relu2":
            return torch.zeros_like(g)
    return g.abs()


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: f"{a.name}-{a.alpha}-{a.limit}")
def test_activations_alone(isa: str, activation: Activation) -> None:
    """Products with the identity are exact, so what comes out is the activation of x. Results below
    e**-87 may be lost, and float64 itself loses those of a gelu below 2**-52."""
    near = torch.linspace(-0.5, 0.5, 4000)
    wide = torch.cat((torch.linspace(-12, 12, 6000), torch.linspace(-100, 100, 1200)))
    tiny = 10.0 ** torch.linspace(-30, -2, 400)
    g = torch.cat((near, wide, tiny, -tiny)).view(-1, 80)
    u = 3 * make_x(len(g), 80, torch.float32)
    x = torch.cat((g, u), 1) if activation.gated else g
    layer = _one_expert(torch.eye(x.shape[1]), torch.eye(x.shape[1], 80), activation, x.dtype)
    y = _run(layer, x)
    want = activation(x.double())
    roundings = reference_moe._FUNCTION_UNITS + _exponent_roundings(activation, g.double())
    least = 2.0**-50 if "gelu" in activation.name else 1e-37
    floor = least * (g.double().abs() + 1) * (1 + u.double().abs())
    error, allowed = (y[:, :80] - want).abs(), roundings * FP32_UNIT * want.abs() + floor
    worst = ((error - floor) / want.abs() / FP32_UNIT).nan_to_num(0).flatten()
    at = int(worst.argmax())
    assert (error <= allowed).all(), f"{worst[at]:.3g} roundings at {g.flatten()[at]:.6g}"
    assert not y[:, 80:].any()


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(
    ("dtype", "step"), [(torch.float16, 2.0**-5), (torch.float32, 2.0**-11)], ids=str
)
def test_what_is_between_the_products_keeps_its_bits(
    isa: str, dtype: torch.dtype, step: float, tokens: int
) -> None:
    """h = (1 + step)**2 = 1 + 2 step + step**2 needs all bits of the dtype, and bf16 has at most
    two terms of it; weights c, -c, c, -c ... then leave 2 step + step**2. Everything is exact."""
    size = 40
    generator = torch.Generator().manual_seed(2)
    w2 = torch.randint(1, 4, (size, size // 2), generator=generator).repeat_interleave(2, dim=1)
    w2[:, 1::2] *= -1
    layer = _one_expert(torch.eye(size), w2, Activation("relu2_no_mul"), dtype)
    x = torch.ones(tokens, size)
    x[:, ::2] += step
    want = w2[:, ::2].double().sum(1) * (2 * step + step**2)
    assert not torch.equal(want.to(dtype), (w2[:, ::2].double().sum(1) * 2 * step).to(dtype))
    assert torch.equal(_run(layer, x.to(dtype)), want.to(dtype).expand(tokens, -1))


def _small(mode: str, dtype: torch.dtype, tokens: int, bias: bool = False) -> Call:
    layer = make_moe(mode, Shape(5, 72, 40, 8), dtype, asymmetric=True, bias=bias)
    return make_call(layer, tokens, 3, dtype)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", SCHEMES)
def test_infinite_and_nan_activations_stay_in_their_token(
    isa: str, mode: str, dtype: torch.dtype, bad: float
) -> None:
    """The token that holds one has no finite output; every other one is untouched, bit for bit. At
    a given scale an infinity is the largest e4m3."""
    for tokens, where in ((2, 1), (9, 4), (40, 17)):
        call = _small(mode, dtype, tokens)
        clean = call()
        x = call.x.clone()
        x[where, 37] = bad
        y = call.layer(x, call.topk_weights, call.topk_ids)
        others = torch.arange(tokens) != where
        assert torch.equal(y[others], clean[others])
        if mode == "fp8_tensor" and bad == bad:
            assert_right(y, dataclasses.replace(call, x=x, _cache={}).expected())
        else:
            assert not y[where].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", SCHEMES)
def test_overflow_of_the_output_is_infinite(isa: str, mode: str, dtype: torch.dtype) -> None:
    """A result beyond the dtype's range becomes an infinity of its sign, as torch rounds."""
    call = _small(mode, dtype, 9)
    weights = torch.full((9, 1), torch.finfo(dtype).max)
    call = Call(call.layer, call.x * 4, weights, call.topk_ids[:, :1].contiguous())
    want = call.expected().y
    beyond = want.abs() > 2 * torch.finfo(dtype).max
    assert beyond.any()
    assert torch.equal(call()[beyond].double(), want[beyond].sign() * float("inf"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", SCHEMES)
def test_tokens_of_zeros(isa: str, mode: str, dtype: torch.dtype) -> None:
    """Among tokens that are not zero: exactly zero without a bias, right with one."""
    for tokens in (1, 40):
        for bias in (False, True):
            call = _small(mode, dtype, tokens, bias)
            call.x[::2] = 0
            y = call()
            assert_right(y, call.expected())
            assert bias == bool(y[::2].any())


@pytest.mark.parametrize("mode", SCHEMES)
def test_an_activation_of_nothing_but_zeros(isa: str, mode: str) -> None:
    """No gate is positive: h is zero, as is what 8 bits make of it."""
    layer = make_moe(mode, Shape(3, 72, 40, 8), torch.float32, Activation("relu2_no_mul"))
    layer = dataclasses.replace(
        layer, w13=dataclasses.replace(layer.w13, bias=torch.full((3, 40), -1e4))
    )
    assert not make_call(layer, 9, 2, torch.float32)().any()


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float16, 2.0**-15 * 1.5),  # subnormal
        (torch.bfloat16, 2.0**-60),
        (torch.bfloat16, 2.0**60),
        (torch.float32, 2.0**-60),
        (torch.float32, 2.0**60),
    ],
)
@pytest.mark.parametrize("mode", SCHEMES)
def test_extreme_values(isa: str, mode: str, dtype: torch.dtype, value: float) -> None:
    """Far from 1 the arithmetic is the same; scales bring the first product back into range."""
    if mode in ("fp8_token", "fp8_group") and value < 2.0**-40:
        pytest.skip("below the smallest scale that e4m3 activations have: all of x is rounded to 0")
    layer = make_moe(mode, Shape(5, 72, 40, 8), dtype, scale_dtype=torch.float32)
    w13 = times(layer.w13, 1 / value)
    if w13.x_scale is not None:
        w13 = dataclasses.replace(w13, x_scale=w13.x_scale * value)
    layer = dataclasses.replace(layer, w13=w13)
    call = make_call(layer, 17, 3, dtype)
    call = dataclasses.replace(call, x=(call.x.double() * value).to(dtype))
    y = call()
    assert_right(y, call.expected())
    with pytest.raises(AssertionError):
        assert_right(y, call.expected(w2=1.01))
