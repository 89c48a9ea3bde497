# SPDX-License-Identifier: Apache-2.0
"""`vllm-tm inspect` of checkpoints of every format says what loading them then does."""

import json

import float_llama
import packed_llama
import pytest
import tiny_llama
import torch
from float_llama import FORMS, INTERMEDIATE

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

from vllm_plugin_tm import layer_table
from vllm_plugin_tm.cli.__main__ import main
from vllm_plugin_tm.patch import apply

pytestmark = pytest.mark.slow

MODULES = 7 * tiny_llama.LAYERS
UP = "model.layers.0.mlp.up_proj"
SHOWN = {
    **{f"{weights} token": f"fp8 {weights}" for weights in ("tensor", "channel")},
    **{f"{weights} static": f"fp8 {weights}" for weights in ("tensor", "channel")},
    **{f"{weights} a16": f"fp8a16 {weights}" for weights in ("tensor", "channel", "block")},
    **dict.fromkeys(("fp8 tensor", "fp8 static"), "fp8 tensor"),
    **dict.fromkeys(("block", "fp8 block", "fp8 block ue8m0"), "fp8 block"),
    "mxfp4": "mxfp4 g32",
    "nvfp4": "nvfp4 g16",
}


@pytest.fixture(autouse=True)
def _patched(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    apply.apply()
    yield
    apply.remove()


def inspected(path, capsys):
    """The quantized modules that the command prints."""
    capsys.readouterr()
    assert main(["inspect", str(path), "--json"]) == 0
    found = {module["module"]: module for module in json.loads(capsys.readouterr().out)}
    for name in ("lm_head", "model.embed_tokens"):
        assert found.pop(name)["scheme"] == "bfloat16"
    assert len(found) == MODULES
    return found


def check(path, capsys, shown, kernel, intermediate, **load):
    found = inspected(path, capsys)
    assert {module["scheme"] for module in found.values()} == {shown}
    assert {(module["kernel"], module["why"]) for module in found.values()} == {(kernel, "")}
    assert found[UP]["shape"] == [intermediate, tiny_llama.HIDDEN]
    assert found[UP]["nbytes"] > intermediate * tiny_llama.HIDDEN // 2
    tiny_llama.load(path, **load)
    assert sum(row.count for row in layer_table.last() if row.on_tm) == 8


@pytest.mark.parametrize("name", FORMS)
def test_floats(tmp_path, capsys, name):
    form = FORMS[name]
    state = float_llama.tensors(form)
    quantization = float_llama.quantization(form)
    tiny_llama.save(tmp_path, state, intermediate=INTERMEDIATE, quantization=quantization)
    check(tmp_path, capsys, SHOWN[name], f"TM {'fp8' if form.fp8 else 'fp4'}", INTERMEDIATE)


@pytest.mark.parametrize(
    ("quantization", "symmetric", "bits", "shown"),
    [
        (packed_llama.gptq(4, 32), True, 4, "gptq w4a16 g32"),
        (packed_llama.gptq(8, 64), True, 8, "gptq w8a16 g64"),
        (packed_llama.awq(32), False, 4, "awq w4a16 g32"),
        (packed_llama.awq(64, zero_point=False), True, 4, "awq w4a16 g64"),
    ],
)
def test_gptq_and_awq(tmp_path, capsys, quantization, symmetric, bits, shown):
    state = tiny_llama.tensors(quantization["group_size"], symmetric=symmetric, bits=bits)
    awq = quantization["quant_method"] == "awq"
    tensors = packed_llama.awq_tensors if awq else packed_llama.gptq_tensors
    other = packed_llama.converted(state, tensors, bits)
    tiny_llama.save(tmp_path, other, quantization=quantization)
    check(tmp_path, capsys, shown, f"TM w{bits}a16", 256, dtype="bfloat16")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"desc_act": True}, "GPTQ with activation order has no TM kernel"),
        ({"sym": False}, "vLLM refuses GPTQ with zero points"),
    ],
)
def test_what_stays_with_upstream_has_a_reason(tmp_path, capsys, change, why):
    other = packed_llama.converted(tiny_llama.tensors(), packed_llama.gptq_tensors)
    tiny_llama.save(tmp_path, other, quantization=packed_llama.gptq(4, 32) | change)
    found = inspected(tmp_path, capsys)
    assert {(module["kernel"], module["why"]) for module in found.values()} == {("upstream", why)}


def test_refusals_name_module_and_method(tmp_path, capsys):
    other = packed_llama.converted(tiny_llama.tensors(), packed_llama.gptq_tensors)
    tiny_llama.save(tmp_path / "a", other, quantization=packed_llama.gptq(4, 32))
    assert main(["inspect", str(tmp_path / "a"), "--source", str(tmp_path / "a")]) == 1
    assert "quant_method 'gptq' are not compared" in capsys.readouterr().err
    del other[f"{UP}.qzeros"]
    tiny_llama.save(tmp_path / "b", other, quantization=packed_llama.gptq(4, 32))
    assert main(["inspect", str(tmp_path / "b")]) == 1
    assert f"{UP}: tensors" in capsys.readouterr().err
