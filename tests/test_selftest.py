# SPDX-License-Identifier: Apache-2.0
"""selftest.py: a right kernel passes on every instruction set, a slightly wrong one never does."""

import pytest
import torch

from vllm_plugin_tm import envs, selftest
from vllm_plugin_tm.kernels import ops

pytestmark = pytest.mark.skipif(not ops.is_available(), reason="the extension is not built")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(selftest, "_results", {})
    in_use = ops.get_isa()
    yield
    ops.set_isa(in_use)


SCHEMES = envs.SCHEMES
KERNELS = (*SCHEMES, *(f"{scheme}_moe" for scheme in SCHEMES))


def op_of(kernel):
    """The op that a self-test is of."""
    return kernel if kernel.endswith("_moe") else f"{kernel}_linear"


def test_every_scheme_has_a_test():
    assert set(selftest.kernels()) == set(KERNELS)
    with pytest.raises(KeyError):
        selftest.run("w2a2")


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_instruction_set_passes(kernel):
    for isa in ops.cpu_isas():
        ops.set_isa(isa)
        result = selftest.run(kernel)
        assert result.ok, result
        assert result.isa == isa
        assert result.kernel == op_of(kernel)
        assert 0 < result.error <= 1


def wrong_linear(change, scheme="w4a16"):
    right = getattr(torch.ops.vllm_plugin_tm, f"{scheme}_linear")

    def wrong(x, *others):
        return change(right(x, *others), x)

    return wrong


def one_element(y, x):
    y = y.clone()
    if x.shape[0] == 67 and x.dtype == torch.float16:
        y[66, 36] += 0.5
    return y


def one_nan(y, x):
    y = y.clone()
    if x.shape[0] == 5:
        y[0, 0] = float("nan")
    return y


@pytest.mark.parametrize(
    "change", [lambda y, x: y * 1.01, one_element, one_nan, lambda y, x: y.roll(1, -1)]
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_wrong_kernels_are_refused_loudly(monkeypatch, scheme, change):
    name = f"{scheme}_linear"
    monkeypatch.setattr(torch.ops.vllm_plugin_tm, name, wrong_linear(change, scheme))
    with pytest.raises(selftest.SelfTestError, match=rf"{name} on {ops.get_isa()} failed"):
        selftest.require(scheme)
    with pytest.raises(selftest.SelfTestError):  # a failure is not remembered as a pass
        selftest.require(scheme)


def other_channels(y, x):
    return y.roll(1, -1)


def nan_of_many(y, x):
    y = y.clone()
    if x.shape[0] == 50:
        y[49, 71] = float("nan")
    return y


@pytest.mark.parametrize("change", [lambda y, x: y * 1.02, other_channels, nan_of_many])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_wrong_experts_are_refused_loudly(monkeypatch, scheme, change):
    name = f"{scheme}_moe"
    right = getattr(torch.ops.vllm_plugin_tm, name)
    monkeypatch.setattr(
        torch.ops.vllm_plugin_tm, name, lambda x, *others: change(right(x, *others), x)
    )
    with pytest.raises(selftest.SelfTestError, match=rf"{name} on {ops.get_isa()} failed"):
        selftest.require(name)


@pytest.mark.parametrize(
    ("scheme", "place", "ignored", "detail"),
    [
        pytest.param("w4a8", 7, False, "per token and group", id="x_groups"),
        pytest.param("w8a8", 8, True, "asymmetric dynamic", id="x_symmetric"),
        pytest.param("w8a8", 7, None, "asymmetric static", id="x_zero_point"),
    ],
)
def test_every_kind_of_activations_is_looked_at(monkeypatch, scheme, place, ignored, detail):
    """A kernel that ignores one of its flags is refused, and the message says where."""
    right = getattr(torch.ops.vllm_plugin_tm, f"{scheme}_linear")

    def wrong(*arguments):
        return right(*arguments[:place], ignored, *arguments[place + 1 :])

    monkeypatch.setattr(torch.ops.vllm_plugin_tm, f"{scheme}_linear", wrong)
    with pytest.raises(selftest.SelfTestError, match=detail):
        selftest.require(scheme)


def test_it_runs_once_per_instruction_set(monkeypatch):
    runs = []
    result = selftest.Result("w4a16_linear", "any", 0.5, True, "")
    monkeypatch.setattr(selftest, "run", lambda scheme: runs.append(scheme) or result)
    ops.set_isa(ops.cpu_isas()[0])  # whatever an earlier test left
    selftest.require("w4a16")
    selftest.require("w4a16")
    assert runs == ["w4a16"]
    ops.set_isa(ops.cpu_isas()[-1])
    selftest.require("w4a16")
    assert len(runs) == (2 if len(ops.cpu_isas()) > 1 else 1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_defaults_that_the_loader_sets_do_not_reach_it(scheme):
    """The kernel is built inside set_default_torch_dtype and a device context."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert selftest.run(scheme).ok
    finally:
        torch.set_default_dtype(before)


def test_a_kernel_object_is_not_made_when_it_fails(monkeypatch):
    pytest.importorskip("vllm")
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig
    from vllm.scalar_type import scalar_types

    from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_wNa16 import (
        TMWNA16LinearKernel,
    )

    config = MPLinearLayerConfig(
        full_weight_shape=(64, 64),
        partition_weight_shape=(64, 64),
        weight_type=scalar_types.uint4b8,
        act_type=torch.bfloat16,
        group_size=32,
        zero_points=False,
    )
    TMWNA16LinearKernel(config, "w", "s")
    monkeypatch.setattr(selftest, "_results", {})
    monkeypatch.setattr(
        torch.ops.vllm_plugin_tm, "w4a16_linear", wrong_linear(lambda y, x: y * 1.01)
    )
    with pytest.raises(selftest.SelfTestError):
        TMWNA16LinearKernel(config, "w", "s")
