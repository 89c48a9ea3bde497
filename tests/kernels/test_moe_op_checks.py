# SPDX-License-Identifier: Apache-2.0
"""The ops of routed experts as torch sees them, and the arguments that they refuse: messages name
op, argument, what was expected and given."""

from typing import Any

import pytest
import torch
from linear_cases import DTYPES, make_x
from moe_cases import ACTIVATIONS, SCHEMES, Call, Shape, make_call, make_moe
from op_check import opcheck

pytestmark = pytest.mark.usefixtures("extension")

# 3 experts of 40 channels (48 with padding) with 5 groups, and 24 (32; 64 for gate and up) with 3.
SHAPE = Shape(experts=3, hidden=40, intermediate=24, group=8)
OPS = {"w4a16": 4, "w8a16": 8, "w4a8": 4, "w8a8": 8, "fp8": 8, "fp4": 4}  # and weights' bits
MODES = {"fp8": "fp8_tensor", "fp4": "fp4_nv"}  # with all arguments; else the op's name
SCALE_DTYPES = {"fp4": "Byte"}  # else Float is among the good ones
GROUPED = ("w4a16", "w8a16", "w4a8")
TOKENS, TOP_K = 4, 2

# Argument, change (a value, or what to do with the good one), expected, given.
Row = tuple[str, Any, str, str]


def _call(mode: str, dtype: torch.dtype = torch.bfloat16, activation: int = 0) -> Call:
    layer = make_moe(mode, SHAPE, dtype, ACTIVATIONS[activation], asymmetric=True, bias=True)
    return make_call(layer, TOKENS, TOP_K, dtype)


def _moe(op: str, **changes: Any) -> torch.Tensor:
    """The op on a good layer whose expert map names experts 0, 1 and 2, with some arguments
    replaced."""
    call = _call(MODES.get(op, op))
    arguments = call.layer.arguments(call.x, call.topk_weights, call.topk_ids)
    arguments["expert_map"] = torch.arange(3, dtype=torch.int32)
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return call.layer.moe(**arguments)


def _with_id(value: int) -> Any:
    def change(ids: torch.Tensor) -> torch.Tensor:
        ids = ids.clone()
        ids[3, 1] = value
        return ids

    return change


def _product_errors(name: str, op: str, channels: int, k: int) -> list[Row]:
    """Of one of the two weights."""
    bits = OPS[op]
    words, groups = k * bits // 32, 1 if op == "w8a8" else k // 8
    good = f"[3, {channels}, {words}]"
    return [
        (name, lambda w: w.float(), "Int", "Float"),
        (name, lambda w: w[:, :-16].contiguous(), good, f"[3, {channels - 16}, {words}]"),
        (name, lambda w: w[..., :-1].contiguous(), good, f"[3, {channels}, {words - 1}]"),
        (name, lambda w: w.transpose(1, 2).contiguous().transpose(1, 2), "contiguous", name),
        (
            f"{name}_scale",
            lambda s: s[:, :-1],
            f"{channels}, {groups}",
            f"{channels - 1}, {groups}",
        ),
        (f"{name}_scale", lambda s: s[:2], f"[3, {channels}, ", f"[2, {channels}, "),
        (
            f"{name}_scale",
            lambda s: s.flatten(1),
            "[experts, N, groups]",
            f"[3, {channels * groups}]",
        ),
        (f"{name}_scale", lambda s: s[..., :0], "[experts, N, groups]", f"[3, {channels}, 0]"),
        (f"{name}_scale", lambda s: s.double(), SCALE_DTYPES.get(op, "Float"), "Double"),
        (f"{name}_bias", lambda b: b.bfloat16(), "Float", "BFloat16"),
        (
            f"{name}_bias",
            lambda b: b[:, :-1].contiguous(),
            f"[3, {channels}]",
            f"[3, {channels - 1}]",
        ),
        (f"{name}_bias", lambda b: b[0], f"[3, {channels}]", f"[{channels}]"),
        (f"{name}_bias", lambda b: torch.cat((b, b), 1)[:, ::2], "contiguous", f"{name}_bias"),
    ]


def _grouped_errors(name: str, op: str, channels: int, k: int) -> list[Row]:
    groups, rows = k // 8, channels * OPS[op] // 32
    zero, scale, good = f"{name}_zero_point", f"{name}_scale", f"[3, {rows}, {groups}]"

    def in_groups(count: int) -> Any:
        return lambda s: s[..., :1].expand(-1, -1, count).contiguous()

    return [
        # 2 groups of 20 or of 12 weights are no whole dwords, 7 are no whole number of weights.
        *[
            (scale, in_groups(count), f"K = {k}", f"{count} groups")
            for count in ((7,) if op == "w8a16" else (2, 7))
        ],
        (zero, lambda z: z[:, :-1].contiguous(), good, f"[3, {rows - 1}, {groups}]"),
        (zero, lambda z: z[:2], good, f"[2, {rows}, {groups}]"),
        (zero, lambda z: z.flatten(), good, f"[{3 * rows * groups}]"),
        (zero, lambda z: z.to(torch.int8), "Int", "Char"),
    ]  # fmt: skip


def _sum_errors(name: str, channels: int) -> list[Row]:
    sums, scale = f"{name}_weight_sum", f"{name}_scale"
    return [
        (sums, None, "Tensor", "None"),
        (sums, lambda w: w[:, :-1].contiguous(), f"[3, {channels}]", f"[3, {channels - 1}]"),
        (sums, lambda w: w.flatten(), f"[3, {channels}]", f"[{3 * channels}]"),
        (sums, lambda w: w.long(), "Int", "Long"),
        (scale, lambda s: s.bfloat16(), "Float", "BFloat16"),
        (scale, lambda s: s.expand(-1, -1, 2).contiguous(), "one group", "2 groups"),
    ]


def _float_errors(name: str, op: str, channels: int, k: int) -> list[Row]:
    third, scale, good = f"{name}_channel_scale", f"{name}_scale", f"[3, {channels}]"
    count = 7 if op == "fp8" else 2  # of k = 40 or 24: no whole numbers, or no whole dwords
    rows: list[Row] = [
        (
            scale,
            lambda s: s[..., :1].expand(-1, -1, count).contiguous(),
            f"K = {k}",
            f"{count} groups",
        ),
        (third, torch.ones(3, channels - 1), good, f"[3, {channels - 1}]"),
        (third, torch.ones(channels), good, f"[{channels}]"),
        (third, torch.ones(3, channels).double(), "Float", "Double"),
        (third, torch.ones(3, 2 * channels)[:, ::2], "contiguous", third),
    ]
    if op == "fp4":
        return [*rows, (scale, lambda s: s.view(torch.int8), "Byte", "Char")]
    x_scale = f"{name}_x_scale"
    return [
        *rows,
        (scale, lambda s: s.bfloat16(), "Float", "BFloat16"),
        (x_scale, None, "expected one where x_rounding is 'tensor'", "x_rounding is 'tensor'"),
        (x_scale, torch.ones(2), "[1]", "[2]"),
        (x_scale, torch.tensor(1.0), "[1]", "[]"),
        (x_scale, lambda s: s.double(), "Float", "Double"),
        (x_scale, lambda s: s / 0, "positive finite", "given inf"),
    ]


_FP8_ERRORS: list[Row] = [
    ("x_rounding", "row", "none, token, group or tensor", "given 'row'"),
    ("x_rounding", "", "none, token, group or tensor", "given ''"),
    ("x_group_size", 0, "-1 or more than 0", "given 0"),
    ("x_group_size", -2, "-1 or more than 0", "given -2"),
]


def _errors(op: str) -> list[Row]:
    least = -(2**63)
    rows: list[Row] = [
        ("x", lambda x: x.double(), "BFloat16, Half or Float", "Double"),
        ("x", lambda x: x.to(torch.int8), "BFloat16, Half or Float", "Char"),
        ("x", lambda x: x[0], "[tokens, hidden]", "[40]"),
        ("x", lambda x: x.unsqueeze(0), "[tokens, hidden]", "[1, 4, 40]"),
        ("x", lambda x: x[:, :0], "hidden > 0", "[4, 0]"),
        ("topk_ids", lambda i: i[:3], "[4, top_k]", "[3, 2]"),
        ("topk_ids", lambda i: i.flatten(), "[4, top_k]", "[8]"),
        ("topk_ids", lambda i: i[:, :0], "[4, top_k]", "[4, 0]"),
        ("topk_ids", lambda i: i.short(), "Int or Long", "Short"),
        ("topk_ids", lambda i: i.float(), "Int or Long", "Float"),
        ("topk_ids", _with_id(3), "-1 to 2", "given 3"),
        ("topk_ids", _with_id(-2), "-1 to 2", "given -2"),
        ("topk_ids", lambda i: _with_id(2**32)(i.long()), "-1 to 2", "given 4294967296"),
        ("topk_ids", lambda i: _with_id(least)(i.long()), "-1 to 2", f"given {least}"),
        ("topk_weights", lambda w: w[:, :1], "[4, 2]", "[4, 1]"),
        ("topk_weights", lambda w: w.flatten(), "[4, 2]", "[8]"),
        ("topk_weights", lambda w: w.bfloat16(), "Float", "BFloat16"),
        ("topk_weights", lambda w: w.double(), "Float", "Double"),
        ("expert_map", torch.tensor([0, 1, 3], dtype=torch.int32), "-1 to 2", "given 3"),
        ("expert_map", torch.tensor([-2, -2, -2], dtype=torch.int32), "-1 to 2", "given -2"),
        ("expert_map", lambda m: m.long(), "Int", "Long"),
        ("expert_map", lambda m: m.view(1, 3), "[3]", "[1, 3]"),
        ("expert_map", torch.arange(6, dtype=torch.int32)[::2], "contiguous", "expert_map"),
        ("w13", lambda w: w.flatten(1), "[experts, N, dwords]", "[3, "),
        ("w13", lambda w: w[:0], "[experts, N, dwords]", "[0, 64, "),
        ("activation", "silu", "swiglu, swiglustep, situ", "given 'silu'"),
        ("activation", "", "swiglu, swiglustep, situ", "given ''"),
        ("activation", "silu_no_mul", "[3, 32, ", "[3, 64, "),  # half as many channels
        ("intermediate_size", 0, "1 to 2147483648", "given 0"),
        ("intermediate_size", -24, "1 to 2147483648", "given -24"),
        ("intermediate_size", 2**63 - 1, "1 to 2147483648", "given 9223372036854775807"),
        ("intermediate_size", 48, "[3, 96, ", "[3, 64, "),
        *_product_errors("w13", op, 64, 40),
        *_product_errors("w2", op, 48, 24),
    ]  # fmt: skip
    for name, channels, k in (("w13", 64, 40), ("w2", 48, 24)):
        rows += _sum_errors(name, channels) if op == "w8a8" else []
        rows += _grouped_errors(name, op, channels, k) if op in GROUPED else []
        rows += _float_errors(name, op, channels, k) if op.startswith("fp") else []
        if op.endswith("a16"):
            rows.append((f"{name}_scale", lambda s: s.half(), "BFloat16", "Half"))
    rows += _FP8_ERRORS if op == "fp8" else []
    if op == "fp4":
        rows.append(("scale_type", "float", "e8m0 or e4m3", "given 'float'"))
    if op == "w4a8":  # scales of any dtype, but of one
        rows.append(("w2_scale", lambda s: s.half(), "BFloat16", "Half"))
    return rows


# What a wrong argument is found by where it is another one's shape that it contradicts.
_FOUND_BY = {"activation": "w13", "intermediate_size": "w13"}


@pytest.mark.parametrize(
    ("op", "row"),
    [
        pytest.param(op, row, id=f"{op}-{row[0]}-{number}")
        for op in OPS
        for number, row in enumerate(_errors(op))
    ],
)
def test_refuses(op: str, row: Row) -> None:
    """The message names the op, the argument, what was expected and what was given."""
    argument, change, expected, given = row
    with pytest.raises(RuntimeError) as caught:
        _moe(op, **{argument: change})
    message = str(caught.value)
    assert f"{op}_moe" in message
    named = _FOUND_BY.get(argument, "") if "[" in expected else ""
    assert f"'{named or argument}'" in message
    assert expected in message
    assert given in message
    assert "xpected" in message


@pytest.mark.parametrize("rounding", ["none", "token", "group"])
@pytest.mark.parametrize("argument", ["w13_x_scale", "w2_x_scale"])
def test_a_scale_of_x_is_for_tensors_alone(argument: str, rounding: str) -> None:
    """One that is given beside another rounding would be dropped."""
    changes: dict[str, Any] = {"w13_x_scale": None, "w2_x_scale": None, "x_rounding": rounding}
    _moe("fp8", **changes)
    with pytest.raises(
        RuntimeError, match=rf"fp8_moe: argument '{argument}'.*none else.*{rounding}"
    ):
        _moe("fp8", **(changes | {argument: torch.ones(1)}))


def test_groups_of_x_are_whole_groups_of_weights() -> None:
    """Of both products: the weights' groups are 8 of 40 and 24, or with one group all 40."""
    changes = {"w13_x_scale": None, "w2_x_scale": None, "x_rounding": "group"}
    for size in (-1, 8, 16, 40):
        assert _moe("fp8", **changes, x_group_size=size).isfinite().all()
    one_group = {"w13_scale": lambda s: s[..., :1].contiguous()}
    for size, more in ((4, {}), (12, {}), (24, one_group)):
        with pytest.raises(RuntimeError, match=rf"fp8_moe: argument 'x_group_size'.*given {size}"):
            _moe("fp8", **changes, **more, x_group_size=size)


@pytest.mark.parametrize("op", [*GROUPED, "fp8", "fp4"])
def test_intermediate_size_is_held_to_groups(op: str) -> None:
    """A size that the packed shapes allow, as they are padded, but that groups do not divide."""
    with pytest.raises(RuntimeError, match=rf"{op}_moe: argument 'w2_scale': expected K = 22 .*3"):
        _moe(op, intermediate_size=22)


_THIRDS = {
    "w8a8": ("_weight_sum",),
    "fp8": ("_x_scale",),  # that of channels is not given
    "fp4": ("_channel_scale",),
}
_TENSORS = [
    (op, name)
    for op in OPS
    for name in (
        *("x", "topk_weights", "topk_ids", "expert_map"),
        *(
            f"{w}{part}"
            for w in ("w13", "w2")
            for part in ("", "_scale", *_THIRDS.get(op, ("_zero_point",)), "_bias")
        ),
    )
]


@pytest.mark.parametrize(("op", "argument"), _TENSORS)
def test_refuses_another_device(op: str, argument: str) -> None:
    """One tensor on another device is an error that names both devices. A meta tensor stands for
    any: torch dispatches it to the fake, whose word would else be taken for a result."""
    with pytest.raises(RuntimeError, match=r"cpu.*meta|meta.*cpu"):
        _moe(op, **{argument: lambda t: t.to("meta")})


@pytest.mark.parametrize("op", OPS)
def test_a_good_call_after_bad_ones(op: str) -> None:
    """Errors leave nothing behind; scratch memory of a refused call is not used."""
    want = _moe(op)
    for argument, change, _, _ in _errors(op):
        with pytest.raises(RuntimeError):
            _moe(op, **{argument: change})
    assert torch.equal(_moe(op), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", SCHEMES)
def test_opcheck(mode: str, dtype: torch.dtype) -> None:
    """torch's own check: schema, aliasing, fake against real, dynamic shapes."""
    call = _call(mode, dtype, activation=DTYPES.index(dtype) * 4)
    for tokens in (0, 1, TOKENS):
        routing = (call.topk_weights[:tokens], call.topk_ids[:tokens].long())
        arguments = call.layer.arguments(call.x[:tokens], *routing)
        if tokens == TOKENS:
            arguments["expert_map"] = torch.tensor([2, -1, 0], dtype=torch.int32)
        opcheck(call.layer.moe.default, tuple(arguments.values()))


@pytest.mark.parametrize("mode", SCHEMES)
def test_fake_has_the_real_metadata(mode: str) -> None:
    """Shape, dtype, strides and device, for x in any memory order."""
    call = _call(mode)
    for x in (call.x, call.x.t().contiguous().t(), call.x[:0]):
        routing = (call.topk_weights[: len(x)], call.topk_ids[: len(x)])
        real = call.layer(x, *routing)
        with torch._subclasses.FakeTensorMode() as fakes:
            fake = call.layer.moe(
                *(
                    fakes.from_tensor(value) if isinstance(value, torch.Tensor) else value
                    for value in call.layer.arguments(x, *routing).values()
                )
            )
        assert (fake.shape, fake.dtype, fake.stride(), fake.device) == (
            real.shape,
            real.dtype,
            real.stride(),
            real.device,
        )


@pytest.mark.parametrize("mode", SCHEMES)
def test_compile_without_a_graph_break(mode: str) -> None:
    """fullgraph with a dynamic number of tokens: one graph serves them all, with the same bits."""
    torch._dynamo.reset()  # or the graphs of all modes count against the limit of one function
    layer = _call(mode).layer
    arguments = layer.arguments(*torch.empty(3, 0))
    rest = list(arguments.values())[3:]
    moe = layer.moe
    graphs = 0

    def count(graph: torch.fx.GraphModule, example: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def compiled(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.relu(moe(x * 2, weights, ids, *rest))

    for tokens in (4, 2, 5, 64, 129):
        call = make_call(layer, tokens, TOP_K, torch.bfloat16)
        x = make_x(tokens, SHAPE.hidden, torch.bfloat16)
        for tensor in (x, call.topk_weights, call.topk_ids):
            torch._dynamo.mark_dynamic(tensor, 0)
        y = compiled(x, call.topk_weights, call.topk_ids)
        eager = layer(x * 2, call.topk_weights, call.topk_ids)
        assert torch.equal(y, torch.nn.functional.relu(eager))
    assert graphs == 1
