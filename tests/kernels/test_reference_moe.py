# SPDX-License-Identifier: Apache-2.0
"""The oracle of routed experts itself: against plain formulas, and its bounds. Runs no kernel."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from linear_cases import DTYPES, KEPT, make_x
from moe_cases import (
    ACTIVATIONS,
    INTEGER_SCHEMES,
    KEPT_SCHEMES,
    SCHEMES,
    X_SCALES,
    Activation,
    Call,
    MoeLayer,
    Shape,
    make_call,
    make_moe,
)
from torch import Tensor

from vllm_plugin_tm.kernels import reference, reference_float
from vllm_plugin_tm.kernels.reference_moe import Experts

SHAPE = Shape(experts=4, hidden=72, intermediate=40, group=8)


def _call(mode: str, dtype: torch.dtype, activation: Activation = ACTIVATIONS[0]) -> Call:
    layer = make_moe(mode, SHAPE, dtype, activation, asymmetric=True, bias=True)
    return make_call(layer, 21, 3, dtype, "absent")


def _matrix(layer: MoeLayer, weights: Experts, expert: int, k: int) -> Tensor:
    codes, scale, zero_point, _ = weights.arguments(expert)
    if layer.op == "fp8":
        return reference_float.dequantize_fp8(codes, scale)
    if layer.op == "fp4":
        channels = weights.channel_scale
        channels = None if channels is None else channels[expert]
        return reference_float.dequantize_fp4(codes, scale, weights.scale_type, channels)
    return reference.dequantize(codes, scale, zero_point, k, weights.bits)


def _plain(
    call: Call, of_x: Callable[[Tensor], Tensor], of_h: Callable[[Tensor], Tensor]
) -> Tensor:
    """Token by token and choice by choice, with what becomes of x and of h given."""
    layer, y = call.layer, torch.zeros(call.x.shape, dtype=torch.float64)
    for token, ids in enumerate(call.topk_ids.tolist()):
        for slot, expert in enumerate(ids):
            if expert < 0:
                continue
            assert layer.w13.bias is not None
            assert layer.w2.bias is not None
            x = of_x(call.x[token]).double()
            first = _matrix(layer, layer.w13, expert, layer.hidden) @ x
            first += layer.w13.bias[expert].double()
            h = of_h(layer.activation(first)).double()
            down = _matrix(layer, layer.w2, expert, layer.intermediate) @ h
            weight = float(call.topk_weights[token, slot])
            y[token] += weight * (down + layer.w2.bias[expert].double())
    return y


def _int8(groups: int) -> Callable[[Tensor], Tensor]:
    """Symmetric rounding to int8 in float32, 127.5 steps up to the largest value; and back."""

    def fake_quantize(values: Tensor) -> Tensor:
        cut = values.float().view(groups, -1)
        scale = cut.abs().amax(1, keepdim=True) / 127.5
        return ((cut / scale).round().clamp(-128, 127).double() * scale.double()).flatten()

    return fake_quantize


def _e4m3(
    group: int, scale: float | None = None, divided: bool = False
) -> Callable[[Tensor], Tensor]:
    """Rounding to e4m3 in float32, 448 being the largest value of a group, or by a given scale;
    and back. Values are divided by their scale, or multiplied by its reciprocal."""

    def fake_quantize(values: Tensor) -> Tensor:
        parts = []
        for part in values.float().split(group):
            step = part.abs().max() / 448 if scale is None else torch.tensor(scale)
            scaled = part / step if divided else part * (1 / step)
            codes = scaled.clamp(-448, 448).to(torch.float8_e4m3fn)
            parts.append(codes.double() * step.double())
        return torch.cat(parts)

    return fake_quantize


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: f"{a.name}-{a.limit}")
@pytest.mark.parametrize("mode", KEPT_SCHEMES)
def test_kept_activations(mode: str, activation: Activation) -> None:
    """Of float32 nothing is rounded worth the name; of 16 bits h is, once."""
    call = _call(mode, torch.float32, activation)
    want = _plain(call, lambda x: x, lambda h: h)
    assert (call.expected().y - want).norm() < 1e-6 * want.norm()
    for dtype in DTYPES[:2]:
        call = _call(mode, dtype, activation)
        want = _plain(call, lambda x: x, lambda h, dtype=dtype: h.to(dtype))
        torch.testing.assert_close(call.expected().y, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", [mode for mode in INTEGER_SCHEMES if mode not in KEPT])
def test_integer_activations(mode: str, dtype: torch.dtype) -> None:
    """x and h are rounded to int8, row by row or group by group, h straight from float32."""
    call = _call(mode, dtype)
    x_groups, h_groups = (72 // 8, 40 // 8) if mode == "w4a8_groups" else (1, 1)
    want = _plain(call, _int8(x_groups), _int8(h_groups))
    torch.testing.assert_close(call.expected().y, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("mode", "of_x", "of_h"),
    [
        ("fp8_token", _e4m3(72), _e4m3(40)),
        ("fp8_group", _e4m3(8, divided=True), _e4m3(8, divided=True)),
        ("fp8_group-long", _e4m3(16, divided=True), _e4m3(16, divided=True)),
        ("fp8_tensor", _e4m3(72, X_SCALES[0]), _e4m3(40, X_SCALES[1])),
    ],
)
def test_e4m3_activations(
    mode: str,
    of_x: Callable[[Tensor], Tensor],
    of_h: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> None:
    """x and h are rounded to e4m3, row by row, group by group, the last of them a shorter one, or
    by the scale of their product; h straight from float32."""
    mode, _, long = mode.partition("-")
    layer = make_moe(mode, SHAPE, dtype, bias=True, long_x_groups=bool(long))
    call = make_call(layer, 21, 3, dtype, "absent")
    torch.testing.assert_close(call.expected().y, _plain(call, of_x, of_h), rtol=1e-9, atol=1e-9)


_G, _U = torch.linspace(-6, 6, 49, dtype=torch.float64), torch.linspace(5, -5, 49).double()
_F = torch.nn.functional
_FORMULAS = {
    Activation(): _F.silu(_G) * _U,
    Activation("swiglu", 1.702, 1.0, 2.5): (
        _G.clamp(max=2.5) / (1 + torch.exp(-1.702 * _G.clamp(max=2.5))) * (_U.clamp(-2.5, 2.5) + 1)
    ),
    Activation("swiglustep", limit=1.5): _F.silu(_G).clamp(max=1.5) * _U.clamp(-1.5, 1.5),
    Activation("situ", 0.7, 0.9): (
        0.7 * torch.tanh(_G / 0.7) / (1 + torch.exp(-_G)) * 0.9 * torch.tanh(_U / 0.9)
    ),
    Activation("situ", 1.3, 0.0): 1.3 * torch.tanh(_G / 1.3) / (1 + torch.exp(-_G)) * _U,
    Activation("gelu"): _G * (1 + torch.erf(_G / math.sqrt(2))) / 2 * _U,
    Activation("gelu_tanh"): (
        _G * (1 + torch.tanh(math.sqrt(2 / math.pi) * (_G + 0.044715 * _G**3))) / 2 * _U
    ),
    Activation("silu_no_mul"): _F.silu(_G),
    Activation("gelu_no_mul"): _F.gelu(_G),
    Activation("gelu_tanh_no_mul"): _F.gelu(_G, approximate="tanh"),
    Activation("relu2_no_mul"): _F.relu(_G) ** 2,
}


@pytest.mark.parametrize("activation", _FORMULAS, ids=lambda a: f"{a.name}-{a.alpha}")
def test_activations(activation: Activation) -> None:
    """Each against its formula; the gates are the first half."""
    products = torch.cat((_G, _U)) if activation.gated else _G
    torch.testing.assert_close(activation(products), _FORMULAS[activation], rtol=1e-12, atol=1e-15)


def test_every_activation_of_the_ops_has_a_formula() -> None:
    names = {activation.name for activation in _FORMULAS}
    assert names == {activation.name for activation in ACTIVATIONS}
    with pytest.raises(ValueError, match="unknown activation 'swish'"):
        Activation("swish")(_G)


def test_experts_that_are_elsewhere_add_nothing() -> None:
    """-1 as an id, and as what a map makes of one."""
    call = _call("w4a16", torch.float32)
    zeroed = dataclasses.replace(
        call,
        topk_weights=call.topk_weights.masked_fill((call.topk_ids < 0) | (call.topk_ids == 2), 0),
        topk_ids=call.topk_ids.clamp(min=0),
        _cache={},
    )
    expert_map = torch.tensor([0, 1, -1, 3], dtype=torch.int32)
    mapped = dataclasses.replace(
        call, layer=dataclasses.replace(call.layer, expert_map=expert_map), _cache={}
    )
    torch.testing.assert_close(mapped.expected().y, zeroed.expected().y, rtol=1e-9, atol=1e-9)
    assert (call.expected().y - mapped.expected().y).norm() > 0.1 * call.expected().y.norm()


# Of the values, in norm. One rounding of the output is at most 2**-8 (bf16), 2**-11 (fp16); what a
# rare second rounding of h adds is less. In float32 the bound is the sum, over all summands of both
# products, of the worst that six deviations allow: far above a real error, and far below what
# rounding x or h to bf16 does.
_KEPT_BOUNDS = {torch.bfloat16: 0.005, torch.float16: 0.001, torch.float32: 4e-4}
# The largest value of a row or group is at code -127.5 where it is negative: a tie, so the code is
# -128 or -127 by the last bit of float32. That is 1/127.5 of the value that counts most; in groups
# of 8 one value of 16 is such a one. In e4m3 it is at code 448; ties elsewhere are rare, but a
# rounding more or less is 1/16 of its value.
_TIES = 0.014


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", SCHEMES)
def test_the_tolerance_is_small(mode: str, dtype: torch.dtype) -> None:
    """Small beside the values, and no less than one rounding of the output."""
    for activation in ACTIVATIONS:
        want = _call(mode, dtype, activation).expected()
        bound = _KEPT_BOUNDS[dtype] + (0 if mode in KEPT_SCHEMES else _TIES)
        assert want.allowed.norm() < bound * want.y.norm()
        assert (want.allowed >= torch.finfo(dtype).eps / 2 * want.y.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", [mode for mode in INTEGER_SCHEMES if mode not in KEPT])
def test_the_tolerance_without_ties_is_smaller_still(mode: str, dtype: torch.dtype) -> None:
    """Where no largest h is negative, integers have the bound of a linear layer."""
    want = _call(mode, dtype, Activation("relu2_no_mul")).expected()
    assert want.allowed.norm() < (torch.finfo(dtype).eps / 2 + 1e-4) * want.y.norm()


@pytest.mark.parametrize("mode", ["fp8_token", "fp8_group", "fp8_tensor"])
def test_the_tolerance_covers_either_rounding_of_e4m3(mode: str) -> None:
    """Values at and beside ties, halfway between two e4m3, and what an error of them makes of the
    scale: every rounding of what is within the error is within the bound, which is little more."""
    layer = make_moe(mode, SHAPE, torch.float32)
    ties = torch.tensor([448.0, 104, 9.25, -13.5, 0.0, 17, 2.0**-10, -300])
    x_scale = layer.w2.x_scale
    x = (ties if x_scale is None else ties * x_scale.double()).repeat(5).double()
    rounding = (mode.partition("_")[2], x_scale, 8)
    want = reference_float.round_x(x, *rounding)
    want_x = want.values.double() * want.scale.double()
    generator = torch.Generator().manual_seed(1)
    for size in (0.0, 1e-7, 1e-3):
        off = size * x.abs()
        allowed = reference_float.rounded_x_tolerance(x, off, *rounding)
        assert (allowed <= (1 / 8 + 4 * size + 1e-6) * x.abs() + 2.0**-8).all()
        for _ in range(50):
            other = x + off * (2 * torch.rand(40, generator=generator).double() - 1)
            rounded = reference_float.round_x(other, *rounding)
            error = (rounded.values.double() * rounded.scale.double() - want_x).abs()
            assert (error <= allowed).all()


@pytest.mark.parametrize("mode", SCHEMES)
def test_no_tokens(mode: str) -> None:
    """An empty batch has an empty result and an empty bound."""
    layer = _call(mode, torch.bfloat16).layer
    empty = torch.empty(0, 3)
    call = Call(layer, make_x(0, 72, torch.bfloat16), empty, empty.int())
    assert call.expected().y.shape == call.expected().allowed.shape == (0, 72)
