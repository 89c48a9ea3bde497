# SPDX-License-Identifier: Apache-2.0
"""The ops as torch sees them: schemas, fakes, torch.compile, the choice of the instruction set."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_cases import DTYPES, MODES, Layer, make_layer, make_x
from op_check import opcheck, python_dispatch_is_off

from vllm_plugin_tm import envs
from vllm_plugin_tm.bench import machine
from vllm_plugin_tm.kernels import ops

pytestmark = pytest.mark.usefixtures("extension")

N, K, GROUP = 40, 96, 32

CASES = [
    pytest.param(mode, dtype, asymmetric, bias, id=f"{mode}-{str(dtype)[6:]}-{asymmetric=}-{bias=}")
    for mode in MODES
    for dtype, asymmetric, bias in zip(
        DTYPES, (True, False, True), (False, True, True), strict=True
    )
]


def _case(mode: str, dtype: torch.dtype, asymmetric: bool, bias: bool) -> Layer:
    return make_layer(mode, N, K, GROUP, dtype, asymmetric, bias)


@pytest.mark.parametrize(("mode", "dtype", "asymmetric", "bias"), CASES)
def test_opcheck_linear(mode: str, dtype: torch.dtype, asymmetric: bool, bias: bool) -> None:
    """torch's own check: schema, aliasing, fake against real, dynamic shapes."""
    layer = _case(mode, dtype, asymmetric, bias)
    for shape in ((3, K), (2, 3, K), (1, K), (0, K)):
        x = make_x(6, K, dtype).view(-1)[: torch.Size(shape).numel()].view(shape)
        opcheck(layer.linear.default, tuple(layer.arguments(x).values()))


@pytest.mark.parametrize("mode", ["w4a16", "w8a16", "w8a8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_pack(mode: str, dtype: torch.dtype) -> None:
    for asymmetric in (False, True):
        layer = _case(mode, dtype, asymmetric, False)
        pack = getattr(torch.ops.vllm_plugin_tm, f"{mode}_pack")
        opcheck(pack.default, layer.disk)


def test_opcheck_survives_a_state_that_torch_left_behind() -> None:
    """What an op does wrong still fails."""
    layer = _case("w4a16", torch.bfloat16, False, False)
    arguments = tuple(layer.arguments(make_x(2, K, torch.bfloat16)).values())
    torch._C._dispatch_tls_set_dispatch_key_excluded(torch._C.DispatchKey.Python, True)
    with pytest.warns(UserWarning, match="left its Python dispatch off"):
        opcheck(layer.linear.default, arguments)
    assert not python_dispatch_is_off()
    with pytest.raises(Exception, match="missing value for argument 'scale'"):
        opcheck(layer.linear.default, arguments[:2])


@pytest.mark.parametrize("shape", [(7, K), (2, 5, K), (0, K), (K,)])
@pytest.mark.parametrize("mode", MODES)
def test_fake_has_the_real_metadata(mode: str, shape: tuple[int, ...]) -> None:
    """Shape, dtype, strides and device, for x in any memory order."""
    layer = _case(mode, torch.bfloat16, True, True)
    x = torch.randn(shape).bfloat16()
    views = [x, x.transpose(0, -1).contiguous().transpose(0, -1)]
    for view in views:
        real = layer(view)
        with torch._subclasses.FakeTensorMode() as mode_of_fakes:
            fake = layer.linear(
                *(
                    mode_of_fakes.from_tensor(value) if isinstance(value, torch.Tensor) else value
                    for value in layer.arguments(view).values()
                )
            )
        assert (fake.shape, fake.dtype, fake.stride(), fake.device) == (
            real.shape,
            real.dtype,
            real.stride(),
            real.device,
        )


@pytest.mark.parametrize("mode", MODES)
def test_compile_without_a_graph_break(mode: str) -> None:
    """fullgraph with a dynamic number of rows: one graph serves them all, with the same bits."""
    torch._dynamo.reset()  # or the graphs of all modes count against the limit of one function
    layer = _case(mode, torch.bfloat16, True, True)
    _, *rest = layer.arguments(torch.empty(1, K)).values()
    linear = layer.linear
    graphs = 0

    def count(graph: torch.fx.GraphModule, example: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.relu(linear(x * 2, *rest))

    for rows in (4, 2, 5, 64, 129):
        x = make_x(rows, K, torch.bfloat16)
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(compiled(x), torch.nn.functional.relu(layer(x * 2)))
    assert graphs == 1


def test_set_isa_refuses() -> None:
    """An unknown instruction set, and those this processor lacks, leave the choice as it was."""
    before = ops.get_isa()
    lacking = set(envs.ISAS) - set(ops.cpu_isas())
    for name in ("", "none", "AVX2", "AMX", "avx512_vnni", *sorted(lacking)):
        with pytest.raises(ValueError, match=r"is not one of"):
            ops.set_isa(name)
    assert ops.get_isa() == before
    assert before in ops.cpu_isas()


def test_a_refused_amx_is_refused_with_the_systems_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "cpu_isas", lambda: ("avx512", "avx2"))
    monkeypatch.setattr(ops, "amx_problem", lambda: "made-up reason")
    with pytest.raises(ValueError, match=r"'amx' is not one of .* processor: made-up reason$"):
        ops.set_isa("amx")
    with pytest.raises(ValueError, match=r"'avx512bf16' is not one of .* processor$"):
        ops.set_isa("avx512bf16")


def test_amx_is_used_or_there_is_a_reason() -> None:
    flags = machine.cpuinfo(Path("/proc/cpuinfo").read_text())["flags"].split()
    able = {"amx_tile", "amx_int8", "amx_bf16"} <= set(flags)
    assert able == ("amx" in ops.cpu_isas() or bool(ops.amx_problem()))


def test_the_names_of_instruction_sets_are_the_documented_ones() -> None:
    """Each is accepted by the variable that forces it, and best comes first."""
    isas = ops.cpu_isas()
    assert isas == tuple(name for name in envs.ISAS if name in isas)


def test_the_best_is_chosen_but_for_a_bf16_dot_that_is_slower_than_multiply_adds() -> None:
    """Intel's processors with BF16 and VBMI start a vpdpbf16ps every other cycle only."""
    info = machine.cpuinfo(Path("/proc/cpuinfo").read_text())
    flags = info["flags"].split()
    isas = list(ops.cpu_isas())
    if info["vendor_id"] == "GenuineIntel" and "avx512vbmi" in flags and "avx512_bf16" in flags:
        isas.remove("avx512bf16")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_PLUGIN_TM")}
    script = "from vllm_plugin_tm.kernels import ops; print(ops.get_isa())"
    chosen = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert chosen.stdout.split() == isas[:1], chosen.stderr
