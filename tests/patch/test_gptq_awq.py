# SPDX-License-Identifier: Apache-2.0
"""GPTQ and AWQ checkpoints of the same weights end in the tensors that compressed-tensors does, and
in the same op: they cannot differ in speed."""

import pytest
import tiny_llama
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

from vllm_plugin_tm import layer_table
from vllm_plugin_tm.patch import apply

pytestmark = pytest.mark.slow

# AWQ's order of columns within a 32-bit word.
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
NAMES = {"weight_packed": "qweight", "weight_scale": "scales", "weight_zero_point": "qzeros"}


def gptq(bits, group):
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": False,
        "sym": True,
    }


def awq(group, zero_point=True):
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": zero_point,
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


def codes(packed, k, bits=4, packed_dim=1):
    """Unsigned codes from compressed-tensors' packing."""
    shape = torch.Size((packed.shape[0], k))
    if packed_dim == 0:
        shape = torch.Size((k, packed.shape[1]))
    return unpack_from_int32(packed, bits, shape, packed_dim=packed_dim).int() + (1 << (bits - 1))


def words(values, bits=4):
    """As many unsigned codes of the last dimension as an int32 holds into one, the first in the
    lowest bits."""
    shifts = torch.arange(0, 32, bits)
    wide = (values.reshape(*values.shape[:-1], -1, 32 // bits).long() << shifts).sum(-1)
    return wide.to(torch.int32)


def awq_words(values):
    return words(values.reshape(*values.shape[:-1], -1, 8)[..., AWQ_ORDER].flatten(-2))


def converted(state, layer_tensors, bits=4):
    """The checkpoint with every quantized layer's tensors replaced by layer_tensors(...)."""
    result = {}
    for name, tensor in state.items():
        base, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            k = int(state[f"{base}.weight_shape"][1])
            zeros = state.get(f"{base}.weight_zero_point")
            new = layer_tensors(codes(tensor, k, bits), state[f"{base}.weight_scale"], zeros, bits)
            result.update({f"{base}.{key}": value.contiguous() for key, value in new.items()})
        elif leaf not in ("weight_scale", "weight_shape", "weight_zero_point"):
            result[name] = tensor
    return result


def gptq_tensors(values, scale, _zeros, bits):
    n, k = values.shape
    groups = scale.shape[1]
    # GPTQ stores the zero point less one: the middle code is 7 in every nibble, 127 in every byte.
    less_one = torch.full((groups, n), (1 << (bits - 1)) - 1)
    return {
        "qweight": words(values, bits).t(),
        "scales": scale.t(),
        "qzeros": words(less_one, bits),
        "g_idx": torch.arange(k, dtype=torch.int32) // (k // groups),
    }


def awq_tensors(values, scale, zeros, _bits):
    n, groups = scale.shape
    zero = torch.full((n, groups), 8) if zeros is None else codes(zeros, n, packed_dim=0)
    return {
        "qweight": awq_words(values.t()),
        "scales": scale.t(),
        "qzeros": awq_words(zero.t()),
    }


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

    other = converted(state, gptq_tensors if kind == "gptq" else awq_tensors, bits)
    quantization = gptq(bits, group) if kind == "gptq" else awq(group)
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
    other = converted(state, awq_tensors)
    tiny_llama.save(tmp_path / "awq", other, quantization=awq(32, zero_point=False))
    model = tiny_llama.load(tmp_path / "awq", dtype="bfloat16")
    row = layer_table.last()[0]
    assert (row.scheme, row.on_tm, row.count) == ("AutoAWQMarlinLinearMethod", True, 8)
    check_same_products(tiny_llama.load(tmp_path / "ct"), model)

    changed = "model.layers.0.mlp.down_proj"
    other[f"{changed}.qzeros"] += 1
    tiny_llama.save(tmp_path / "moved", other, quantization=awq(32, zero_point=False))
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
    other = converted(tiny_llama.tensors(group, bits=bits), gptq_tensors, bits)
    tiny_llama.save(tmp_path, other, quantization=gptq(bits, group))
    with pytest.raises(ValueError, match=words):
        tiny_llama.load(tmp_path, dtype="bfloat16")
