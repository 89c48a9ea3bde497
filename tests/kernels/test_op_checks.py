# SPDX-License-Identifier: Apache-2.0
"""Arguments that the ops refuse: messages name op, argument, what was expected and given."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear_cases import make_layer, make_x

pytestmark = pytest.mark.usefixtures("extension")

N, K, GROUP = 40, 96, 32  # 48 channels with padding, 3 groups
# And their weights' bits.
LINEARS = {"w4a16": 4, "w8a16": 8, "w4a8": 4, "w8a8": 8, "fp8": 8, "fp4": 4}
GROUPED = ("w4a16", "w8a16", "w4a8")
MODES = {"w8a8": "w8a8_static_asym", "fp8": "fp8_tensor", "fp4": "fp4_nv"}  # with all arguments

# Argument, change (a value, or what to do with the good one), expected, given.
Row = tuple[str, Any, str, str]


def _call(op: Any, arguments: dict[str, Any], changes: dict[str, Any]) -> Any:
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return op(**arguments)


def _linear(op: str, **changes: Any) -> torch.Tensor:
    """The op on a good layer, with some arguments replaced."""
    layer = make_layer(MODES.get(op, op), N, K, GROUP, torch.bfloat16, asymmetric=True, bias=True)
    return _call(layer.linear, layer.arguments(make_x(3, K, torch.bfloat16)), changes)


def _pack(op: str, **changes: Any) -> tuple[torch.Tensor, ...]:
    layer = make_layer(op, N, K, GROUP, torch.bfloat16, asymmetric=True)
    names = ("weight", "scale") if op == "w8a8" else ("weight_packed", "scale", "zero_point", "k")
    arguments = dict(zip(names, layer.disk, strict=False))
    return _call(getattr(torch.ops.vllm_plugin_tm, f"{op}_pack"), arguments, changes)


def _common_errors(bits: int, groups: int) -> list[Row]:
    words = K * bits // 32
    return [
        ("x", lambda x: x.double(), "BFloat16, Half or Float", "Double"),
        ("x", lambda x: x.to(torch.int8), "BFloat16, Half or Float", "Char"),
        ("x", lambda x: x[:, :0], "K > 0", "[3, 0]"),
        ("x", lambda x: x[0, 0], "[..., K]", "[]"),
        ("weight", lambda w: w.float(), "Int", "Float"),
        ("weight", lambda w: w[:-16], f"[48, {words}]", f"[32, {words}]"),
        ("weight", lambda w: w[:, :-1].contiguous(), f"[48, {words}]", f"[48, {words - 1}]"),
        ("weight", lambda w: w.flatten(), f"[48, {words}]", f"[{48 * words}]"),
        ("weight", lambda w: w.t().contiguous().t(), "contiguous", "contiguous"),
        ("scale", lambda s: s[:N], f"[48, {groups}]", f"[40, {groups}]"),
        ("scale", lambda s: s.flatten(), f"[48, {groups}]", f"[{48 * groups}]"),
        ("bias", lambda b: b[:-1], "[40]", "[39]"),
        ("bias", lambda b: b.float(), "BFloat16", "Float"),
        ("bias", lambda b: torch.cat((b, b))[::2], "contiguous", "contiguous"),
        ("n", 0, "1 to 2147483648", "given 0"),
        ("n", -1, "1 to 2147483648", "given -1"),
        ("n", -(2**63), "1 to 2147483648", "given -9223372036854775808"),
        ("n", 2**63 - 1, "1 to 2147483648", "given 9223372036854775807"),
    ]


def _group_errors(bits: int) -> list[Row]:
    per_dword = 32 // bits
    allowed = f"multiple of {per_dword} that divides K = 96"
    return [
        ("scale", lambda s: s[:, :2].contiguous(), "[48, 3]", "[48, 2]"),
        *[
            ("group_size", size, allowed, f"given {size}")
            for size in (0, -2, 64, 3 * per_dword // 2, 192, -(2**63))
        ],
    ]


def _zero_point_errors(bits: int) -> list[Row]:
    rows = 48 * bits // 32
    return [
        ("zero_point", lambda z: z[:-1], f"[{rows}, 3]", f"[{rows - 1}, 3]"),
        ("zero_point", lambda z: z[:0].flatten(), "2 dimensions", "[0]"),
        ("zero_point", lambda z: z.to(torch.int8), "Int", "Char"),
    ]


FP8_ERRORS: list[Row] = [
    ("scale", lambda s: s.bfloat16(), "Float", "BFloat16"),
    ("scale", lambda s: s.double(), "Float", "Double"),
    ("x_rounding", "row", "none, token, group or tensor", "given 'row'"),
    ("x_rounding", "", "none, token, group or tensor", "given ''"),
    ("x_rounding", "Token", "none, token, group or tensor", "given 'Token'"),
    ("x_scale", torch.ones(2), "[1]", "[2]"),
    ("x_scale", torch.tensor(1.0), "[1]", "[]"),
    ("x_scale", lambda s: s.double(), "Float", "Double"),
    ("x_scale", lambda s: s.bfloat16(), "Float", "BFloat16"),
    ("x_scale", lambda s: s * 0, "positive finite", "given 0"),
    ("x_scale", lambda s: -s, "positive finite", "given -"),
    ("x_scale", lambda s: s * float("nan"), "positive finite", "nan"),
]
FP4_ERRORS: list[Row] = [
    ("scale", lambda s: s.view(torch.int8), "Byte", "Char"),
    ("scale", lambda s: s.view(torch.float8_e4m3fn), "Byte", "Float8_e4m3fn"),
    ("scale", lambda s: s.float(), "Byte", "Float"),
    ("scale_type", "e4m3fn", "e8m0 or e4m3", "given 'e4m3fn'"),
    ("scale_type", "", "e8m0 or e4m3", "given ''"),
    ("channel_scale", lambda c: c[:N], "[48]", "[40]"),
    ("channel_scale", lambda c: c.view(48, 1), "[48]", "[48, 1]"),
    ("channel_scale", torch.tensor(1.0), "[48]", "[]"),
    ("channel_scale", lambda c: c.double(), "Float", "Double"),
    ("channel_scale", lambda c: c.bfloat16(), "Float", "BFloat16"),
    ("channel_scale", lambda c: torch.cat((c, c))[::2], "contiguous", "contiguous"),
]

W8A8_ERRORS: list[Row] = [
    ("scale", lambda s: s.bfloat16(), "Float", "BFloat16"),
    ("weight_sum", lambda w: w[:N], "[48]", "[40]"),
    ("weight_sum", lambda w: w.view(48, 1), "1 dimension", "[48, 1]"),
    ("weight_sum", lambda w: w.long(), "Int", "Long"),
    ("x_scale", torch.ones(2), "[1]", "[2]"),
    ("x_scale", torch.tensor(1.0), "[1]", "[]"),
    ("x_scale", lambda s: s.double(), "Float", "Double"),
    ("x_scale", lambda s: s.bfloat16(), "Float", "BFloat16"),
    ("x_scale", lambda s: s * 0, "positive finite", "given 0"),
    ("x_scale", lambda s: -s, "positive finite", "given -"),
    ("x_scale", lambda s: s / 0, "positive finite", "given inf"),
    ("x_scale", lambda s: s * float("nan"), "positive finite", "nan"),
    ("x_zero_point", torch.tensor([128], dtype=torch.int32), "-128 to 127", "given 128"),
    ("x_zero_point", torch.tensor([-129], dtype=torch.int32), "-128 to 127", "given -129"),
    ("x_zero_point", lambda z: z.to(torch.int8), "Int", "Char"),
    ("x_zero_point", lambda z: z.float(), "Int", "Float"),
    ("x_zero_point", lambda z: z.expand(2).clone(), "[1]", "[2]"),
]


def _linear_errors(op: str) -> list[Row]:
    bits = LINEARS[op]
    if op == "w8a8":
        return _common_errors(bits, 1) + W8A8_ERRORS
    rows = _common_errors(bits, 3) + _group_errors(bits)
    if op in ("fp8", "fp4"):
        return rows + (FP8_ERRORS if op == "fp8" else FP4_ERRORS)
    rows += _zero_point_errors(bits)
    if op == "w4a8":  # scales of any dtype
        return [*rows, ("scale", lambda s: s.double(), "BFloat16, Half or Float", "Double")]
    return [
        *rows,
        ("scale", lambda s: s.float(), "BFloat16", "Float"),
        ("scale", lambda s: s.half(), "BFloat16", "Half"),
    ]


def _pack_errors(op: str) -> list[Row]:
    if op == "w8a8":
        return [
            ("weight", lambda w: w.int(), "Char", "Int"),
            ("weight", lambda w: w.flatten(), "[N, K]", "[3840]"),
            ("weight", lambda w: w[:0], "neither 0", "[0, 96]"),
            ("weight", lambda w: w[:, :0], "neither 0", "[40, 0]"),
            ("weight", lambda w: w[:, ::2], "contiguous", "contiguous"),
            ("scale", lambda s: s.bfloat16(), "Float", "BFloat16"),
            ("scale", lambda s: s[:-1], "[40, 1]", "[39, 1]"),
            ("scale", lambda s: s.flatten(), "[40, 1]", "[40]"),
        ]
    bits = LINEARS[op]
    words, per_dword, zero_rows = K * bits // 32, 32 // bits, 40 * bits // 32
    least, below, above = (2, 1, 5) if op == "w4a16" else (5, 4, 9)
    return [
        ("weight_packed", lambda c: c.float(), "Int", "Float"),
        ("weight_packed", lambda c: c.long(), "Int", "Long"),
        ("weight_packed", lambda c: c[:, 1:].contiguous(), f"[40, {words}]", f"[40, {words - 1}]"),
        ("weight_packed", lambda c: c.flatten(), f"[N, ceil(k*{bits}/32)]", f"[{40 * words}]"),
        ("weight_packed", lambda c: c[:0], "N > 0", f"[0, {words}]"),
        ("weight_packed", lambda c: c.to(torch.int8), "[40, 96]", f"[40, {words}]"),
        ("scale", lambda s: s.double(), "BFloat16, Half or Float", "Double"),
        ("scale", lambda s: s[:-1], "[40, 3]", "[39, 3]"),
        ("scale", lambda s: s.flatten(), "[N, groups]", "[120]"),
        ("scale", lambda s: s[:, :0], "[N, groups]", "[40, 0]"),
        ("scale", lambda s: torch.cat((s, s[:, :2]), dim=1), f"multiple of {per_dword}", "5"),
        ("zero_point", lambda z: z.float(), "Int", "Float"),
        ("zero_point", lambda z: z[:-1], f"[{zero_rows}, 3]", f"[{zero_rows - 1}, 3]"),
        ("k", 0, "1 to 2147483648", "given 0"),
        ("k", -96, "1 to 2147483648", "given -96"),
        ("k", 2**63 - 1, "1 to 2147483648", "given 9223372036854775807"),
        ("bits", below, f"{least} to {bits}", f"given {below}"),
        ("bits", above, f"{least} to {bits}", f"given {above}"),
        ("bits", -(2**63), f"{least} to {bits}", "given -9223372036854775808"),
    ]


def _table(errors: Callable[[str], list[Row]], ops: tuple[str, ...]) -> list[Any]:
    return [
        pytest.param(op, row, id=f"{op}-{row[0]}-{number}")
        for op in ops
        for number, row in enumerate(errors(op))
    ]


@pytest.mark.parametrize(("op", "row"), _table(_linear_errors, tuple(LINEARS)))
def test_linear_refuses(op: str, row: Row) -> None:
    """The message names the op, the argument, what was expected and what was given."""
    _refused(_linear, op, f"{op}_linear", row)


@pytest.mark.parametrize(("op", "row"), _table(_pack_errors, ("w4a16", "w8a16", "w8a8")))
def test_pack_refuses(op: str, row: Row) -> None:
    """The same for packing."""
    _refused(_pack, op, f"{op}_pack", row)


def test_a_zero_point_needs_a_scale() -> None:
    """Dynamic activations find their own zero point: one that is given would be dropped."""
    _refused(_linear, "w8a8", "w8a8_linear", ("x_scale", None, "without x_scale", "x_zero_point"))


@pytest.mark.parametrize("rounding", ["none", "token", "group", "tensor"])
def test_a_scale_of_x_is_for_tensors_alone(rounding: str) -> None:
    """One that is missing cannot be guessed, and one beside another rounding would be dropped."""
    given, missing = torch.ones(1), None
    good, bad = (given, missing) if rounding == "tensor" else (missing, given)
    assert _linear("fp8", x_rounding=rounding, x_scale=good).isfinite().all()
    message = (
        rf"fp8_linear: argument 'x_scale': expected one where .*'tensor' and none .*{rounding}"
    )
    with pytest.raises(RuntimeError, match=message):
        _linear("fp8", x_rounding=rounding, x_scale=bad)


def test_groups_of_x_are_whole_groups_of_weights() -> None:
    """A multiple of the weights' 32; K and more is one group."""
    changes: dict[str, Any] = {"x_rounding": "group", "x_scale": None}
    for size in (-1, 32, 64, 96, 128):
        assert _linear("fp8", **changes, x_group_size=size).isfinite().all()
    for size in (0, -2, 16, 48, -(2**63)):
        row = ("x_group_size", size, "multiple of the weights' group size 32", f"given {size}")
        _refused(lambda op, **more: _linear(op, **changes, **more), "fp8", "fp8_linear", row)


def _refused(call: Callable[..., Any], op: str, name: str, row: Row) -> None:
    argument, change, expected, given = row
    with pytest.raises(RuntimeError) as caught:
        call(op, **{argument: change})
    message = str(caught.value)
    assert name in message
    assert argument in message
    assert expected in message
    assert given in message
    if change is not None:
        assert f"'{argument}'" in message
        assert "expected" in message


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


_TENSORS = [
    *[(op, name) for op in GROUPED for name in ("x", "weight", "scale", "zero_point", "bias")],
    *[("w8a8", name) for name in ("x", "weight", "scale", "weight_sum", "bias")],
    *[("w8a8", name) for name in ("x_scale", "x_zero_point")],
    *[("fp8", name) for name in ("x", "weight", "scale", "bias", "x_scale")],
    *[("fp4", name) for name in ("x", "weight", "scale", "bias", "channel_scale")],
]
_DISK_TENSORS = [
    *[(op, name) for op in GROUPED[:2] for name in ("weight_packed", "scale", "zero_point")],
    ("w8a8", "weight"),
    ("w8a8", "scale"),
]


@pytest.mark.parametrize(("op", "argument"), _TENSORS)
def test_linear_refuses_another_device(op: str, argument: str) -> None:
    """One tensor on another device is an error that names both devices. A meta tensor stands for
    any: torch dispatches it to the fake, whose word would else be taken for a result."""
    with pytest.raises(RuntimeError, match=r"cpu.*meta|meta.*cpu"):
        _linear(op, **{argument: _meta})


@pytest.mark.parametrize(("op", "argument"), _DISK_TENSORS)
def test_pack_refuses_another_device(op: str, argument: str) -> None:
    with pytest.raises(RuntimeError, match=r"cpu.*meta|meta.*cpu"):
        _pack(op, **{argument: _meta})


@pytest.mark.parametrize("op", LINEARS)
def test_a_good_call_after_bad_ones(op: str) -> None:
    """Errors leave nothing behind; scratch memory of a refused call is not used."""
    want = _linear(op)
    for argument, change, _, _ in _linear_errors(op):
        with pytest.raises(RuntimeError):
            _linear(op, **{argument: change})
        assert torch.equal(_linear(op), want)
