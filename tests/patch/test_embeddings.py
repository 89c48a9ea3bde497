# SPDX-License-Identifier: Apache-2.0
"""Quantized input embeddings and output heads of compressed-tensors checkpoints."""

import json

import pytest
import tiny_llama
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

from vllm_plugin_tm import layer_table
from vllm_plugin_tm.patch import apply
from vllm_plugin_tm.quantization.load_check import CheckpointError

pytestmark = pytest.mark.slow

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@pytest.fixture(autouse=True)
def _patched(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    apply.apply()
    yield
    apply.remove()


def weights(bits, group, symmetric=True):
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        "dynamic": False,
    }


def tie(path, drop=(HEAD,)):
    """Makes the checkpoint's embeddings the head's too, whose own tensors go."""
    config = json.loads((path / "config.json").read_text())
    config["tie_word_embeddings"] = True
    (path / "config.json").write_text(json.dumps(config))
    state = load_file(path / "model.safetensors")
    kept = {name: t for name, t in state.items() if not name.startswith(drop)}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})


def write(path, bits, group, head=False, symmetric=True):
    """A tiny Llama whose embeddings, and whose head where asked for, are packed; the real weights
    of both, float32."""
    generator = torch.Generator().manual_seed(3)
    state = tiny_llama.tensors()
    real = {}
    for name in (EMBEDDING, HEAD):
        weight = state[f"{name}.weight"].float()
        if name == HEAD and not head:
            real[name] = weight
            continue
        del state[f"{name}.weight"]
        n, k = weight.shape
        groups = 1 if group is None else k // group
        most = 1 << (bits - 1)
        codes = torch.randint(-most, most, (n, k), dtype=torch.int8, generator=generator)
        scale = (torch.rand(n, groups, generator=generator) + 0.5).bfloat16() / most
        state[f"{name}.weight_packed"] = pack_to_int32(codes, bits)
        state[f"{name}.weight_scale"] = scale
        state[f"{name}.weight_shape"] = torch.tensor([n, k])
        real[name] = codes.float() * scale.float().repeat_interleave(k // groups, 1)
    # Some models do not tell an embedding its name: its class matches.
    packed = ["Embedding", *(["re:.*lm_head$"] if head else [])]
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [] if head else [HEAD],
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights(4, 32)},
            "group_1": {"targets": packed, "weights": weights(bits, group, symmetric)},
        },
    }
    tiny_llama.save(path, state, quantization=quantization)
    return real


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, None), (2, 64)])
@pytest.mark.parametrize("head", [False, True], ids=["", "head"])
def test_rows_are_what_the_checkpoint_says(tmp_path, bits, group, head):
    real = write(tmp_path, bits, group, head)
    model = tiny_llama.load(tmp_path)
    ids = torch.tensor([[0, 5, 255], [7, 7, 100]])
    rows = model.model.embed_tokens(ids)
    assert torch.equal(rows, real[EMBEDDING][ids].bfloat16())
    assert model.model.embed_tokens(ids[:0]).shape == (0, 3, tiny_llama.HIDDEN)
    x = torch.randn(3, tiny_llama.HIDDEN).bfloat16()
    logits = model.lm_head.quant_method.apply(model.lm_head, x)[:, : tiny_llama.VOCABULARY]
    torch.testing.assert_close(logits.float(), x.float() @ real[HEAD].T, rtol=0.01, atol=0.05)
    assert (layer_table.tm_kernel_of(model.lm_head) is not None) == head
    (row,) = [row for row in layer_table.last() if "Embedding" in row.scheme and row.on_tm]
    assert (row.count, row.kernel) == (1, "TMEmbeddingWNA16")


def test_compiled_without_a_graph_break(tmp_path):
    """One graph for any number of tokens."""
    real = write(tmp_path, 4, 32)
    model = tiny_llama.load(tmp_path)
    compiled = torch.compile(model.model.embed_tokens.forward, fullgraph=True, backend="eager")
    for count in (4, 9, 2):
        ids = torch.arange(count) * 11
        torch._dynamo.mark_dynamic(ids, 0)
        assert torch.equal(compiled(ids), real[EMBEDDING][ids].bfloat16())


def test_zero_points_are_refused(tmp_path):
    """Upstream would read them as if there were none."""
    write(tmp_path, 4, 32, symmetric=False)
    with pytest.raises(ValueError, match=r"embeddings of 4 bits, symmetric=False: supported are"):
        tiny_llama.load(tmp_path)


@pytest.mark.parametrize("head", [False, True], ids=["", "head"])
def test_tied_to_the_head_they_are_refused(tmp_path, head):
    """Upstream would look for unpacked weights to share, and find none."""
    write(tmp_path, 4, 32, head)
    tie(tmp_path)
    with pytest.raises(ValueError, match=r"the output head shares \(tie_word_embeddings is true\)"):
        tiny_llama.load(tmp_path)


def packed_head_only(path):
    """A checkpoint whose head is packed and whose embeddings are not; the head's real weights."""
    real = write(path, 4, 32, head=True)[HEAD]
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_1"]["targets"] = ["re:.*lm_head$"]
    (path / "config.json").write_text(json.dumps(config))
    state = load_file(path / "model.safetensors")
    state = {name: t for name, t in state.items() if not name.startswith(EMBEDDING)}
    state[f"{EMBEDDING}.weight"] = tiny_llama.tensors()[f"{EMBEDDING}.weight"]
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return real


def test_a_packed_head_that_the_checkpoint_lacks_is_missing(tmp_path):
    """Tied to embeddings that are not packed, it cannot be made of them."""
    packed_head_only(tmp_path)
    tie(tmp_path)
    with pytest.raises(CheckpointError, match=r"missing.*\n  lm_head.weight_packed"):
        tiny_llama.load(tmp_path)


def test_a_packed_head_of_a_tied_model_is_the_checkpoints(tmp_path):
    """It has its own tensors in the file, whatever the configuration says of tying."""
    real = packed_head_only(tmp_path)
    tie(tmp_path, ("nothing",))
    model = tiny_llama.load(tmp_path)
    x = torch.randn(3, tiny_llama.HIDDEN).bfloat16()
    logits = model.lm_head.quant_method.apply(model.lm_head, x)[:, : tiny_llama.VOCABULARY]
    torch.testing.assert_close(logits.float(), x.float() @ real.T, rtol=0.01, atol=0.05)
