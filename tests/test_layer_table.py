# SPDX-License-Identifier: Apache-2.0
"""layer_table.py: layers are counted where they run, and the reason is given where not on ours."""

from types import SimpleNamespace

import pytest
import torch

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

from vllm.model_executor.kernels.linear import (
    CPUInt8ScaledMMLinearKernel,
    CPUWNA16LinearKernel,
    Dynamic4bitLinearKernel,
    Int8ScaledMMLinearLayerConfig,
    MPLinearLayerConfig,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.scalar_type import scalar_types

from vllm_plugin_tm import envs, layer_table, selftest
from vllm_plugin_tm.layer_table import Row
from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_w4a8_int import (
    TMW4A8IntLinearKernel,
)
from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_int8 import (
    TMInt8ScaledMMLinearKernel,
)
from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_wNa16 import (
    TMWNA16LinearKernel,
)
from vllm_plugin_tm.quantization.experts_kernel import Activation, Names, TMExpertsKernel
from vllm_plugin_tm.quantization.experts_method import TMExpertsMethod
from vllm_plugin_tm.quantization.support_matrix import MoeRequest


def method(name, **attributes):
    """A quantization method of upstream's kind, with that class name."""
    members = {"create_weights": None, "apply": None}
    cls = type(name, (QuantizeMethodBase,), members)
    instance = cls()
    for key, value in attributes.items():
        setattr(instance, key, value)
    return instance


def kernel(cls, group=32, weight_type=scalar_types.uint4b8):
    config = MPLinearLayerConfig(
        full_weight_shape=(256, 256),
        partition_weight_shape=(256, 256),
        weight_type=weight_type,
        act_type=torch.bfloat16,
        group_size=group,
        zero_points=False,
    )
    return cls(config, "w", "s")


def int8_kernel(cls, static=False, symmetric=True):
    config = Int8ScaledMMLinearLayerConfig(static, True, symmetric)
    return cls(config, ["weight", "weight_scale", "input_scale", "input_zero_point", "azp_adj"])


def module(quant_method, scheme=None):
    layer = torch.nn.Module()
    layer.quant_method = quant_method
    if scheme is not None:
        layer.scheme = scheme
    return layer


@pytest.fixture
def model():
    class Wna16(SimpleNamespace):
        pass

    class Fp8(SimpleNamespace):
        pass

    ct = method("CompressedTensorsLinearMethod")
    tm = kernel(TMWNA16LinearKernel)
    root = torch.nn.Module()
    root.a = module(ct, Wna16(kernel=tm))
    root.b = module(ct, Wna16(kernel=tm))
    root.gptq = module(method("AutoGPTQLinearMethod", kernel=kernel(TMWNA16LinearKernel, -1)))
    root.g2 = module(ct, Wna16(kernel=kernel(CPUWNA16LinearKernel, 2)))
    root.passed_over = module(ct, Wna16(kernel=kernel(CPUWNA16LinearKernel)))
    root.fp8 = module(ct, Fp8(kernel=None))
    root.lm_head = module(method("UnquantizedEmbeddingMethod"))
    cache = BaseKVCacheMethod.__new__(BaseKVCacheMethod)
    root.attention = module(cache)
    root.norm = torch.nn.LayerNorm(4)
    return root


def test_every_kind_of_layer_has_its_row(model):
    rows = {row.example: row for row in layer_table.collect(model)}
    isa = ops.get_isa()
    assert rows.pop("a") == Row("Wna16", "TMWNA16LinearKernel", True, isa, 32, "", 2, "a")
    assert rows.pop("gptq") == Row(
        "AutoGPTQLinearMethod", "TMWNA16LinearKernel", True, isa, -1, "", 1, "gptq"
    )
    assert "group size (2) not supported" in rows.pop("g2").note
    assert "upstream passed it over" in rows.pop("passed_over").note
    assert rows.pop("fp8").note == "no TM kernel for this scheme"
    assert rows.pop("lm_head").note == "not quantized"
    assert not rows  # neither the attention's cache nor the norm is a quantizable layer


@pytest.mark.parametrize(
    ("tm", "upstreams", "note"),
    [
        (lambda: int8_kernel(TMInt8ScaledMMLinearKernel), CPUInt8ScaledMMLinearKernel, "per token"),
        (
            lambda: int8_kernel(TMInt8ScaledMMLinearKernel, True, False),
            CPUInt8ScaledMMLinearKernel,
            "static, with zero point",
        ),
        (
            lambda: kernel(TMW4A8IntLinearKernel, 32, scalar_types.int4),
            Dynamic4bitLinearKernel,
            None,
        ),
        (lambda: kernel(TMWNA16LinearKernel, -1, scalar_types.uint8b128), None, None),
    ],
)
def test_layers_of_every_kernel_of_ours(monkeypatch, tm, upstreams, note):
    root = torch.nn.Module()
    root.a = module(method("CompressedTensorsLinearMethod"), SimpleNamespace(kernel=tm()))
    (row,) = layer_table.collect(root)
    assert (row.on_tm, row.isa) == (True, ops.get_isa())
    assert row.kernel == type(root.a.scheme.kernel).__name__
    assert row.note == (f"int8 activations, {note}" if note else "")
    if upstreams is None:
        return
    # The same layer on upstream's kernel, with the scheme kept from us.
    if upstreams is CPUInt8ScaledMMLinearKernel:
        root.a.scheme.kernel = int8_kernel(upstreams)
    else:
        root.a.scheme.kernel = kernel(upstreams, 32, scalar_types.int4)
    (row,) = layer_table.collect(root)
    assert "upstream passed it over" in row.note
    monkeypatch.setenv(envs.TAKEN_SCHEMES.name, "w4a16")
    (row,) = layer_table.collect(root)
    assert (row.on_tm, "is not among the schemes to take" in row.note) == (False, True)


def test_experts_that_are_ours_and_experts_that_are_not(monkeypatch):
    monkeypatch.setattr(selftest, "require", lambda scheme: None)
    request = MoeRequest("w4a8", "int4", False, 32, "bfloat16", 64, 64, 64, "silu")
    ours = TMExpertsKernel(request, Activation("swiglu"), Names("weight", "weight_scale"))
    cls = type("CompressedTensorsW4A8Int8MoEMethod", (TMExpertsMethod, QuantizeMethodBase), {})
    cls.__abstractmethods__ = frozenset()
    root = torch.nn.Module()
    root.a, root.b = module(cls()), module(cls())
    root.a.quant_method.kernel = ours
    root.b.quant_method.note = "activation (relu2) not supported"
    assert layer_table.collect(root) == [
        Row(
            scheme=cls.__name__,
            kernel="TMExpertsKernel",
            on_tm=True,
            isa=ops.get_isa(),
            group_size=32,
            note="int8 activations, per token",
            count=1,
            example="a",
        ),
        Row(cls.__name__, "-", False, "", None, "activation (relu2) not supported", 1, "b"),
    ]
    assert layer_table.tm_kernel_of(root.a) is ours
    assert layer_table.tm_kernel_of(root.b) is None


def test_ours_come_first_and_the_title_counts(model):
    rows = layer_table.collect(model)
    assert [row.on_tm for row in rows] == [True, True, False, False, False, False]
    lines = layer_table.render(rows).splitlines()
    assert lines[0] == "vllm-plugin-tm layers: 3 of 7 on TM kernels"
    assert len(lines) == 2 + len(rows)
    assert "channel" in lines[3]
    for row, line in zip(rows, lines[2:], strict=True):
        assert row.kernel in line
        assert row.example in line


def test_a_model_without_layers_has_a_table_too():
    assert layer_table.render([]).splitlines()[0] == "vllm-plugin-tm layers: 0 of 0 on TM kernels"


def test_the_last_table_is_kept(model):
    rows = layer_table.collect(model)
    layer_table.remember(rows)
    assert layer_table.last() == tuple(rows)
