# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's FP8 and NVFP4 checkpoints: linear layers on our kernels against the oracle on the
checkpoint's own numbers."""

import float_llama
import pytest
import tiny_llama
import torch
from float_llama import FORMS, INTERMEDIATE

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

from vllm_plugin_tm import layer_table
from vllm_plugin_tm.patch import apply
from vllm_plugin_tm.quantization.load_check import CheckpointError

pytestmark = pytest.mark.slow

ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.1.mlp"
FUSED = {
    f"{ATTENTION}.qkv_proj": [f"{ATTENTION}.{part}_proj" for part in "qkv"],
    f"{ATTENTION}.o_proj": [f"{ATTENTION}.o_proj"],
    f"{MLP}.gate_up_proj": [f"{MLP}.gate_proj", f"{MLP}.up_proj"],
    f"{MLP}.down_proj": [f"{MLP}.down_proj"],
}
# ModelOpt's name -> the form of compressed-tensors with the same numbers.
ALGORITHMS = {
    "FP8": "tensor static",
    "FP8_PER_CHANNEL_PER_TOKEN": "channel token",
    "NVFP4": "nvfp4",
    "W4A16_NVFP4": "nvfp4",
}


@pytest.fixture(autouse=True)
def _patched(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    apply.apply()
    yield
    apply.remove()


def alike(state):
    """The scales of whole tensors made equal: ModelOpt gives the parts of a fused layer one."""
    for name, tensor in state.items():
        leaf = name.rpartition(".")[2]
        if leaf == "weight_global_scale" or (leaf == "weight_scale" and tensor.numel() == 1):
            tensor.fill_(33.0 if leaf == "weight_global_scale" else 0.0007)
    return state


def write(path, algorithm, spoil=None):
    """A checkpoint of this algorithm; its form and tensors under compressed-tensors' names."""
    form = FORMS[ALGORITHMS[algorithm]]
    state = alike(float_llama.tensors(form))
    if spoil is not None:
        del state[spoil]
    tiny_llama.save(
        path,
        float_llama.as_modelopt(state, algorithm),
        intermediate=INTERMEDIATE,
        quantization=float_llama.modelopt(algorithm),
    )
    return form, state


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_layer_is_what_the_checkpoint_says(tmp_path, algorithm):
    torch.manual_seed(1)
    form, state = write(tmp_path, algorithm)
    model = tiny_llama.load(tmp_path, dtype="bfloat16")
    row = layer_table.last()[0]
    assert (row.scheme, row.kernel, row.on_tm) == ("ModelOptLinearMethod", form.kernel, True)
    assert sum(row.count for row in layer_table.last() if row.on_tm) == 8
    for name, parts in FUSED.items():
        layer = model.get_submodule(name)
        width = INTERMEDIATE if "down" in name else tiny_llama.HIDDEN
        x = torch.randn(5, width).bfloat16()
        y = layer.quant_method.apply(layer, x)
        want, allowed = float_llama.product(form, state, parts, x)
        assert ((y.double() - want).abs() <= allowed).all(), name


@pytest.mark.parametrize("part", ["up_proj", "down_proj"])
def test_a_missing_vector_of_scales_is_named(tmp_path, part):
    """Scales of channels have one dimension here, two in compressed-tensors."""
    write(tmp_path, "FP8_PER_CHANNEL_PER_TOKEN", f"{MLP}.{part}.weight_scale")
    with pytest.raises(CheckpointError, match=rf"missing.*\n.*{part}\.weight_scale"):
        tiny_llama.load(tmp_path, dtype="bfloat16")
