# SPDX-License-Identifier: Apache-2.0
"""GPTQ and AWQ checkpoints of the same weights end in the tensors that compressed-tensors does."""

import pytest
import tiny_llama
import torch
from awq_words import awq_words, words
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

from vllm_plugin_tm import layer_table
from vllm_plugin_tm.patch import apply

pytestmark = pytest.mark.slow

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": ["lm_head"],
}


@pytest.fixture(autouse=True)
def _patched(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    apply.apply()
    yield
    apply.remove()


def codes(packed, k, packed_dim=1):
    """Unsigned codes from compressed-tensors' packing."""
    shape = torch.Size((packed.shape[0], k))
    if packed_dim == 0:
        shape = torch.Size((k, packed.shape[1]))
    return unpack_from_int32(packed, 4, shape, packed_dim=packed_dim).int() + 8


def converted(state, layer_tensors):
    """The checkpoint with every quantized layer's tensors replaced by layer_tensors(...)."""
    result = {}
    for name, tensor in state.items():
        base, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            n, k = state[f"{base}.weight_shape"].tolist()
            zeros = state.get(f"{base}.weight_zero_point")
            new = layer_tensors(codes(tensor, k), state[f"{base}.weight_scale"], zeros, n, k)
            result.update({f"{base}.{key}": value.contiguous() for key, value in new.items()})
        elif leaf not in ("weight_scale", "weight_shape", "weight_zero_point"):
            result[name] = tensor
    return result


def gptq_tensors(values, scale, _zeros, n, k):
    return {
        "qweight": words(values.t().reshape(k // 8, 8, n).transpose(1, 2)).squeeze(-1),
        "scales": scale.t(),
        # GPTQ stores the zero point less one: 8 is seven in every nibble.
        "qzeros": torch.full((scale.shape[1], n // 8), 0x77777777, dtype=torch.int32),
        "g_idx": torch.arange(k, dtype=torch.int32) // 32,
    }


def awq_tensors(values, scale, zeros, n, _k):
    return {
        "qweight": awq_words(values.t()),
        "scales": scale.t(),
        "qzeros": awq_words(codes(zeros, n, packed_dim=0).t()),
    }


@pytest.mark.parametrize(
    ("quantization", "layer_tensors", "symmetric", "method"),
    [
        (GPTQ, gptq_tensors, True, "AutoGPTQLinearMethod"),
        (AWQ, awq_tensors, False, "AutoAWQMarlinLinearMethod"),
    ],
)
def test_same_weights_same_kernel_tensors(tmp_path, quantization, layer_tensors, symmetric, method):
    state = tiny_llama.tensors(symmetric=symmetric)
    tiny_llama.save(tmp_path / "ct", state, symmetric=symmetric)
    want = tiny_llama.load(tmp_path / "ct")

    other = converted(state, layer_tensors)
    tiny_llama.save(tmp_path / "other", other, quantization=quantization)
    model = tiny_llama.load(tmp_path / "other", dtype="bfloat16")
    row = layer_table.last()[0]
    assert (row.scheme, row.on_tm, row.count) == (method, True, 8)

    names = {"weight_packed": "qweight", "weight_scale": "scales", "weight_zero_point": "qzeros"}
    found = dict(model.named_parameters())
    compared = 0
    for name, param in want.named_parameters():
        base, _, leaf = name.rpartition(".")
        if leaf in names:
            assert torch.equal(param, found[f"{base}.{names[leaf]}"]), name
            compared += 1
    assert compared == (16 if symmetric else 24)
