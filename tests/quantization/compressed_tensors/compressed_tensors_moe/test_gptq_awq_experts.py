# SPDX-License-Identifier: Apache-2.0
"""Experts of GPTQ and AWQ checkpoints end in the tensors that compressed-tensors do: same bits."""

import pytest
import torch
from awq_words import awq_words

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from experts_cases import EXPERTS, Format, Layer, create, loaded, moe_config, processed, routing
from vllm.model_executor.layers.quantization import auto_awq, auto_gptq

pytestmark = pytest.mark.usefixtures("patched")

NAMES = {"qweight": "weight_packed", "scales": "weight_scale", "qzeros": "weight_zero_point"}


def _config(kind, form):
    group = {"group_size": form.group}
    if kind == "gptq":
        config = {"bits": form.bits, **group, "desc_act": False, "sym": True}
        return auto_gptq.AutoGPTQConfig.from_config(config)
    config = {"bits": form.bits, **group, "zero_point": form.asymmetric, "version": "gemm"}
    return auto_awq.AutoAWQConfig.from_config(config)


def _unpacked(words, k):
    """Unsigned codes of the last dimension of int32 words, four bits each."""
    rows = words.reshape(-1, words.shape[-1]).contiguous()
    codes = unpack_from_int32(rows, 4, torch.Size((rows.shape[0], k))).int() + 8
    return codes.view(*words.shape[:-1], k)


def _twin(kind, form, case):
    """The layer of `case`, unprocessed, as the other format has it."""
    config = moe_config()
    method = {"gptq": auto_gptq.AutoGPTQMoEMethod, "awq": auto_awq.AutoAWQMoEMethod}[kind](
        _config(kind, form), config
    )
    layer = Layer(config)
    layer.quant_method, layer._loaded_expert_biases = method, set()
    create(method, layer)
    for product in ("w13", "w2"):
        source = getattr(case.layer, f"{product}_weight_packed").data
        getattr(layer, f"{product}_scales").data.copy_(
            getattr(case.layer, f"{product}_weight_scale").data.transpose(1, 2)
        )
        qweight = getattr(layer, f"{product}_qweight")
        zeros = getattr(case.layer, f"{product}_weight_zero_point", None)
        if kind == "gptq":
            qweight.data.copy_(source.transpose(1, 2))
            continue
        qweight.data.copy_(awq_words(_unpacked(source, source.shape[2] * 8).transpose(1, 2)))
        if zeros is not None:
            codes = _unpacked(zeros.data.transpose(1, 2), zeros.shape[1] * 8)
            getattr(layer, f"{product}_qzeros").data.copy_(awq_words(codes))
    return method, layer


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("gptq", Format("WNA16", 4, 32)),
        ("gptq", Format("WNA16", 4, -1)),
        ("gptq", Format("WNA16", 8, 32)),
        ("awq", Format("WNA16", 4, 32, asymmetric=True)),
    ],
    ids=str,
)
def test_the_same_bits(kind, form):
    method, layer = _twin(kind, form, loaded(form))
    method.process_weights_after_loading(layer)
    want = processed(form)
    for product in ("w13", "w2"):
        for theirs, ours in NAMES.items():
            expected = getattr(want.layer, f"{product}_{ours}", None)
            got = getattr(layer, f"{product}_{theirs}", None)
            assert (got is None) == (expected is None), theirs
            assert expected is None or torch.equal(got.data, expected.data)
    arguments = (*routing(7, torch.bfloat16), None, None)
    y = method.apply(layer, *arguments)
    assert torch.equal(y, want.method.apply(want.layer, *arguments))
    assert method.kernel.group_size == form.group
    assert not method.is_monolithic


def test_awq_without_upstreams_shape_is_refused():
    """Words for too few outputs are named, with the expert."""
    form = Format("WNA16", 4, 32, asymmetric=True)
    method, layer = _twin("awq", form, loaded(form))
    layer.w2_qweight.data = layer.w2_qweight.data[:, :, :-1].contiguous()
    with pytest.raises(ValueError, match=r"expert 0.w2_qweight: expected shape \(96, 64\)"):
        method.process_weights_after_loading(layer)


def test_gptq_biases_that_were_not_loaded_are_none():
    form = Format("WNA16", 4, 32)
    method, layer = _twin("gptq", form, loaded(form))
    layer._loaded_expert_biases = {"w2_bias"}
    layer.w2_bias.data.copy_(torch.randn(EXPERTS, layer.w2_bias.shape[1]))
    bias = layer.w2_bias.data.float()
    method.process_weights_after_loading(layer)
    assert layer.w13_bias is None
    assert torch.equal(layer.w2_bias.data[:, : bias.shape[1]], bias)
