# SPDX-License-Identifier: Apache-2.0
"""The ops as torch sees them: errors that name the argument, schemas, fakes, torch.compile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from w4a16_cases import DTYPES, Layer, make_layer, make_x

from vllm_plugin_tm.kernels import ops

pytestmark = pytest.mark.usefixtures("extension")

N, K, GROUP = 40, 96, 32


def _linear(**changes: Any) -> torch.Tensor:
    """The op on a good layer, with some arguments replaced; a callable gets the good value."""
    layer = make_layer(N, K, GROUP, torch.bfloat16, asymmetric=True, bias=True)
    weight, scale, zero = layer.packed
    arguments = {
        "x": make_x(3, K, torch.bfloat16),
        "weight": weight,
        "scale": scale,
        "zero_point": zero,
        "bias": layer.bias,
        "n": N,
        "group_size": GROUP,
    }
    return torch.ops.vllm_plugin_tm.w4a16_linear(**_changed(arguments, changes))


def _pack(**changes: Any) -> tuple[torch.Tensor, ...]:
    layer = make_layer(N, K, GROUP, torch.bfloat16, asymmetric=True)
    arguments = {
        "weight_packed": layer.codes,
        "scale": layer.scale,
        "zero_point": layer.zero_point,
        "k": K,
    }
    return torch.ops.vllm_plugin_tm.w4a16_pack(**_changed(arguments, changes))


def _changed(arguments: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return arguments


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


LINEAR_ERRORS: tuple[tuple[str, Any, str, str], ...] = (
    # argument, change, expected, given
    ("x", lambda x: x.double(), "BFloat16, Half or Float", "Double"),
    ("x", lambda x: x.to(torch.int8), "BFloat16, Half or Float", "Char"),
    ("x", lambda x: x[:, :0], "K > 0", "[3, 0]"),
    ("x", lambda x: x[0, 0], "[..., K]", "[]"),
    ("weight", lambda w: w.float(), "Int", "Float"),
    ("weight", lambda w: w[:-16], "[48, 12]", "[32, 12]"),
    ("weight", lambda w: w[:, :-1].contiguous(), "[48, 12]", "[48, 11]"),
    ("weight", lambda w: w.flatten(), "[48, 12]", "[576]"),
    ("weight", lambda w: w.t().contiguous().t(), "contiguous", "contiguous"),
    ("scale", lambda s: s.float(), "BFloat16", "Float"),
    ("scale", lambda s: s.half(), "BFloat16", "Half"),
    ("scale", lambda s: s[:, :2].contiguous(), "[48, 3]", "[48, 2]"),
    ("scale", lambda s: s[:N], "[48, 3]", "[40, 3]"),
    ("zero_point", lambda z: z[:5], "[6, 3]", "[5, 3]"),
    ("zero_point", lambda z: z[:0].flatten(), "[6, 3]", "[0]"),
    ("zero_point", lambda z: z.to(torch.int8), "Int", "Char"),
    ("bias", lambda b: b[:-1], "[40]", "[39]"),
    ("bias", lambda b: b.float(), "BFloat16", "Float"),
    ("bias", lambda b: torch.cat((b, b))[::2], "contiguous", "contiguous"),
    ("n", 0, "1 to 2147483648", "given 0"),
    ("n", -1, "1 to 2147483648", "given -1"),
    ("n", -(2**63), "1 to 2147483648", "given -9223372036854775808"),
    ("n", 2**63 - 1, "1 to 2147483648", "given 9223372036854775807"),
    ("group_size", 0, "multiple of 8 that divides K = 96", "0"),
    ("group_size", -2, "multiple of 8 that divides K = 96", "-2"),
    ("group_size", 64, "multiple of 8 that divides K = 96", "64"),
    ("group_size", 12, "multiple of 8 that divides K = 96", "12"),
    ("group_size", 192, "multiple of 8 that divides K = 96", "192"),
    ("group_size", -(2**63), "multiple of 8 that divides K = 96", "-9223372036854775808"),
)
PACK_ERRORS: tuple[tuple[str, Any, str, str], ...] = (
    ("weight_packed", lambda c: c.float(), "Int", "Float"),
    ("weight_packed", lambda c: c.long(), "Int", "Long"),
    ("weight_packed", lambda c: c[:, 1:].contiguous(), "[40, 12]", "[40, 11]"),
    ("weight_packed", lambda c: c.flatten(), "[N, ceil(k/8)]", "[480]"),
    ("weight_packed", lambda c: c[:0], "N > 0", "[0, 12]"),
    ("scale", lambda s: s.double(), "BFloat16, Half or Float", "Double"),
    ("scale", lambda s: s[:-1], "[40, 3]", "[39, 3]"),
    ("scale", lambda s: s.flatten(), "[N, groups]", "[120]"),
    ("scale", lambda s: s[:, :0], "[N, groups]", "[40, 0]"),
    ("scale", lambda s: torch.cat((s, s[:, :2]), dim=1), "multiple of 8", "5"),
    ("zero_point", lambda z: z.float(), "Int", "Float"),
    ("zero_point", lambda z: z[:4], "[5, 3]", "[4, 3]"),
    ("k", 0, "1 to 2147483648", "given 0"),
    ("k", -96, "1 to 2147483648", "given -96"),
    ("k", 2**63 - 1, "1 to 2147483648", "given 9223372036854775807"),
)


@pytest.mark.parametrize(("argument", "change", "expected", "given"), LINEAR_ERRORS)
def test_linear_refuses(argument: str, change: Any, expected: str, given: str) -> None:
    """The message names the op, the argument, what was expected and what was given."""
    _refused(_linear, "w4a16_linear", argument, change, expected, given)


@pytest.mark.parametrize(("argument", "change", "expected", "given"), PACK_ERRORS)
def test_pack_refuses(argument: str, change: Any, expected: str, given: str) -> None:
    """The same for packing."""
    _refused(_pack, "w4a16_pack", argument, change, expected, given)


def _refused(
    op: Callable[..., Any], name: str, argument: str, change: Any, expected: str, given: str
) -> None:
    with pytest.raises(RuntimeError) as caught:
        op(**{argument: change})
    message = str(caught.value)
    assert name in message
    assert f"'{argument}'" in message
    assert "expected" in message
    assert expected in message
    assert given in message


@pytest.mark.parametrize("argument", ["x", "weight", "scale", "zero_point", "bias"])
def test_linear_refuses_another_device(argument: str) -> None:
    """One tensor on another device is an error that names both devices. A meta tensor stands for
    any: torch dispatches it to the fake, whose word would else be taken for a result."""
    with pytest.raises(RuntimeError, match=r"cpu.*meta|meta.*cpu"):
        _linear(**{argument: _meta})


@pytest.mark.parametrize("argument", ["weight_packed", "scale", "zero_point"])
def test_pack_refuses_another_device(argument: str) -> None:
    with pytest.raises(RuntimeError, match=r"cpu.*meta|meta.*cpu"):
        _pack(**{argument: _meta})


def test_a_good_call_after_bad_ones() -> None:
    """Errors leave nothing behind; scratch memory of a refused call is not used."""
    want = _linear()
    for argument, change, _, _ in LINEAR_ERRORS:
        with pytest.raises(RuntimeError):
            _linear(**{argument: change})
        assert torch.equal(_linear(), want)


def test_set_isa_refuses() -> None:
    """An unknown instruction set, and those this processor lacks, leave the choice as it was."""
    before = ops.get_isa()
    for name in ("", "none", "AVX2", "amx", "avx512vnni"):
        with pytest.raises(ValueError, match=r"is not one of"):
            ops.set_isa(name)
    assert ops.get_isa() == before
    assert before in ops.cpu_isas()


CASES = [
    pytest.param(dtype, asymmetric, bias, id=f"{str(dtype)[6:]}-{asymmetric=}-{bias=}")
    for dtype, asymmetric, bias in zip(
        DTYPES, (True, False, True), (False, True, True), strict=True
    )
]


def _case(dtype: torch.dtype, asymmetric: bool, bias: bool) -> Layer:
    return make_layer(N, K, GROUP, dtype, asymmetric, bias)


@pytest.mark.parametrize(("dtype", "asymmetric", "bias"), CASES)
def test_opcheck_linear(dtype: torch.dtype, asymmetric: bool, bias: bool) -> None:
    """torch's own check: schema, aliasing, fake against real, dynamic shapes."""
    layer = _case(dtype, asymmetric, bias)
    for shape in ((3, K), (2, 3, K), (1, K), (0, K)):
        x = make_x(6, K, dtype).view(-1)[: torch.Size(shape).numel()].view(shape)
        torch.library.opcheck(
            torch.ops.vllm_plugin_tm.w4a16_linear.default,
            (x, *layer.packed, layer.bias, layer.n, layer.group_size),
        )


@pytest.mark.parametrize(("dtype", "asymmetric", "bias"), CASES)
def test_opcheck_pack(dtype: torch.dtype, asymmetric: bool, bias: bool) -> None:
    layer = _case(dtype, asymmetric, bias)
    torch.library.opcheck(torch.ops.vllm_plugin_tm.w4a16_pack.default, (*layer.disk, layer.k))


@pytest.mark.parametrize("shape", [(7, K), (2, 5, K), (0, K), (K,)])
def test_fake_has_the_real_metadata(shape: tuple[int, ...]) -> None:
    """Shape, dtype, strides and device, for x in any memory order."""
    layer = _case(torch.bfloat16, True, True)
    x = torch.randn(shape).bfloat16()
    views = [x, x.transpose(0, -1).contiguous().transpose(0, -1)]
    for view in views:
        real = layer(view)
        with torch._subclasses.FakeTensorMode() as mode:
            tensors = (view, *layer.packed, layer.bias)
            fake = torch.ops.vllm_plugin_tm.w4a16_linear(
                *(mode.from_tensor(tensor) for tensor in tensors), layer.n, layer.group_size
            )
        assert (fake.shape, fake.dtype, fake.stride(), fake.device) == (
            real.shape,
            real.dtype,
            real.stride(),
            real.device,
        )


def test_compile_without_a_graph_break() -> None:
    """fullgraph with a dynamic number of rows: one graph serves them all, with the same bits."""
    layer = _case(torch.bfloat16, True, True)
    parts = layer.packed
    graphs = 0

    def count(graph: torch.fx.GraphModule, example: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.vllm_plugin_tm.w4a16_linear(
            x * 2, *parts, layer.bias, layer.n, layer.group_size
        )
        return torch.nn.functional.relu(y)

    for rows in (4, 2, 5, 64, 129):
        x = make_x(rows, K, torch.bfloat16)
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(x), torch.nn.functional.relu(layer(x * 2)))
    assert graphs == 1
