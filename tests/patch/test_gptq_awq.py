# SPDX-License-Identifier: Apache-2.0
"""GPTQ and AWQ checkpoints of the same weights end in the tensors that compressed-tensors does, and
in the same op: they cannot differ in speed."""

import packed_llama
import pytest
import tiny_llama
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

from vllm_plugin_tm import layer_table
from vllm_plugin_tm.patch import apply
from vllm_plugin_tm.quantization.load_check import CheckpointError

pytestmark = pytest.mark.slow

NAMES = {"weight_packed": "qweight", "weight_scale": "scales", "weight_zero_point": "qzeros"}


@pytest.fixture(autouse=True)
def _patched(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    apply.apply()
    yield
    apply.remove()


class Ops(TorchDispatchMode):
    """Names the ops that run inside it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def products(model):
    """Name -> ops of ours that a quantized layer runs, and what they make of the same x."""
    found = {}
    for name, module in model.named_modules():
        kernel = layer_table.tm_kernel_of(module)
        if kernel is None:
            continue
        generator = torch.Generator().manual_seed(1)
        k = kernel.config.partition_weight_shape[0]
        x = torch.randn(5, k, generator=generator).bfloat16()
        with Ops() as ops_run:
            y = module.quant_method.apply(module, x)
        ours = [op for op in ops_run.names if op.startswith("vllm_plugin_tm.")]
        found[name] = (type(kernel), kernel.group_size, kernel.plan.product, ours, y)
    return found


def check_same_products(want, found):
    want, found = products(want), products(found)
    assert want.keys() == found.keys()
    for name, (*how, y) in want.items():
        *other, other_y = found[name]
        assert how == other, name
        assert len(how[-1]) == 1, name
        assert torch.equal(y, other_y), name
    return {op for *_, (op,), _ in want.values()}


@pytest.mark.parametrize("group", [16, 32, 64, 128, -1])
@pytest.mark.parametrize(
    ("kind", "bits", "method", "op"),
    [
        ("gptq", 4, "AutoGPTQLinearMethod", "w4a16_linear"),
        ("gptq", 8, "AutoGPTQLinearMethod", "w8a16_linear"),
        ("awq", 4, "AutoAWQMarlinLinearMethod", "w4a16_linear"),
    ],
)
def test_same_weights_same_kernel_tensors(tmp_path, kind, bits, method, op, group):
    symmetric = kind == "gptq"
    state = tiny_llama.tensors(group, symmetric=symmetric, bits=bits)
    tiny_llama.save(tmp_path / "ct", state, group, symmetric=symmetric, bits=bits)
    want = tiny_llama.load(tmp_path / "ct")

    other = packed_llama.converted(
        state, packed_llama.gptq_tensors if kind == "gptq" else packed_llama.awq_tensors, bits
    )
    quantization = packed_llama.gptq(bits, group) if kind == "gptq" else packed_llama.awq(group)
    tiny_llama.save(tmp_path / "other", other, quantization=quantization)
    model = tiny_llama.load(tmp_path / "other", dtype="bfloat16")
    # At group 128 the layers whose input is one group stand in a row of their own.
    ours = [row for row in layer_table.last() if row.on_tm]
    assert {row.scheme for row in ours} == {method}
    assert sum(row.count for row in ours) == 8

    found = dict(model.named_parameters())
    compared = 0
    for name, param in want.named_parameters():
        base, _, leaf = name.rpartition(".")
        if leaf in NAMES:
            assert torch.equal(param, found[f"{base}.{NAMES[leaf]}"]), name
            compared += 1
    assert compared == (16 if symmetric else 24)
    assert check_same_products(want, model) == {f"vllm_plugin_tm.{op}.default"}


def test_awq_without_zero_points(tmp_path):
    """Such files have the middle code in their zero points, and are computed as symmetric weights
    are, bit for bit; another zero point in the file is not ignored."""
    state = tiny_llama.tensors()
    tiny_llama.save(tmp_path / "ct", state)
    other = packed_llama.converted(state, packed_llama.awq_tensors)
    tiny_llama.save(tmp_path / "awq", other, quantization=packed_llama.awq(32, zero_point=False))
    model = tiny_llama.load(tmp_path / "awq", dtype="bfloat16")
    row = layer_table.last()[0]
    assert (row.scheme, row.on_tm, row.count) == ("AutoAWQMarlinLinearMethod", True, 8)
    check_same_products(tiny_llama.load(tmp_path / "ct"), model)

    changed = "model.layers.0.mlp.down_proj"
    other[f"{changed}.qzeros"] += 1
    tiny_llama.save(tmp_path / "moved", other, quantization=packed_llama.awq(32, zero_point=False))
    moved = products(tiny_llama.load(tmp_path / "moved", dtype="bfloat16"))
    same = {name: torch.equal(y, moved[name][-1]) for name, (*_, y) in products(model).items()}
    assert [name for name, equal in same.items() if not equal] == [changed]


@pytest.mark.parametrize(
    ("bits", "group", "schemes", "words"),
    [
        (8, 32, "w4a16", r"w8a16 is not among the schemes to take \('w4a16',\)"),
        # What upstream refused before it had looked for a kernel stays refused.
        (4, 16, "w8a16", r"self_attn.qkv_proj.*Marlin does not support group_size = 16"),
    ],
)
def test_layers_that_are_not_ours_are_refused_by_upstream(
    tmp_path, monkeypatch, bits, group, schemes, words
):
    monkeypatch.setenv("VLLM_PLUGIN_TM_SCHEMES", schemes)
    other = packed_llama.converted(
        tiny_llama.tensors(group, bits=bits), packed_llama.gptq_tensors, bits
    )
    tiny_llama.save(tmp_path, other, quantization=packed_llama.gptq(bits, group))
    with pytest.raises(ValueError, match=words):
        tiny_llama.load(tmp_path, dtype="bfloat16")


@pytest.mark.parametrize("packing", ["gptq", "awq"])
def test_the_layers_of_auto_rounds_method_are_known(tmp_path, packing):
    """Their kernel lies deeper in upstream's method: the table has it, and what a checkpoint lacks
    is missed."""
    state = tiny_llama.tensors(symmetric=packing == "gptq")
    tensors = packed_llama.gptq_tensors if packing == "gptq" else packed_llama.awq_tensors
    other = packed_llama.converted(state, tensors)
    quantization = packed_llama.auto_round(4, 32, packing)
    tiny_llama.save(tmp_path / "whole", other, quantization=quantization)
    tiny_llama.load(tmp_path / "whole", dtype="bfloat16")
    row = layer_table.last()[0]
    assert (row.scheme, row.kernel, row.on_tm) == ("INCLinearMethod", "TMWNA16LinearKernel", True)
    assert row.count == 8
    del other["model.layers.1.mlp.up_proj.scales"]
    tiny_llama.save(tmp_path / "part", other, quantization=quantization)
    with pytest.raises(CheckpointError, match=r"missing.*\n.*layers\.1\.mlp\.up_proj\.scales"):
        tiny_llama.load(tmp_path / "part", dtype="bfloat16")
