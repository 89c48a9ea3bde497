# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose layers are of different kinds: each layer runs as its own part of the
configuration says, and what vLLM runs as one must be of one kind."""

import json

import float_llama
import pytest
import tiny_llama
import torch
from float_llama import Form

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

from vllm_plugin_tm import layer_table
from vllm_plugin_tm.patch import apply
from vllm_plugin_tm.quantization.load_check import CheckpointError

pytestmark = pytest.mark.slow

FP8 = Form("channel", "token", "CompressedTensorsW8A8Fp8", "TMFp8LinearKernel")
FP8_KEPT = Form("channel", "none", "CompressedTensorsW8A16Fp8", "TMWFp8A16LinearKernel")
NVFP4 = Form("nvfp4", "none", "CompressedTensorsW4A4Fp4", "TMNvFp4LinearKernel")
LEAVES = ("weight_packed", "weight_scale", "weight_shape")


@pytest.fixture(autouse=True)
def _patched(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    apply.apply()
    yield
    apply.remove()


def group(targets, form=None):
    """One group of the configuration: a float's, or int4 by groups of 32."""
    if form is not None:
        made = float_llama.quantization(form)
        scheme = made["config_groups"]["group_0"] | {"targets": targets}
        return scheme | {"format": made["format"]}
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "format": "pack-quantized",
    }


def write(path, floats, groups, ignore):
    """tiny_llama with the layers that `floats` names (endings -> form) replaced, and those that
    `ignore` names in 16 bits; its tensors."""
    generator = torch.Generator().manual_seed(5)
    ints = tiny_llama.tensors(intermediate=float_llama.INTERMEDIATE)
    state = {}
    for name, tensor in ints.items():
        base, _, leaf = name.rpartition(".")
        if leaf not in LEAVES:
            state[name] = tensor
            continue
        form = next((form for end, form in floats.items() if base.endswith(end)), None)
        plain = base in ignore
        if not plain and form is None:
            state[name] = tensor
        elif leaf == "weight_shape" and plain:
            n, k = tensor.tolist()
            weight = torch.randn(n, k, generator=generator) * k**-0.5
            state[f"{base}.weight"] = weight.bfloat16()
        elif leaf == "weight_shape":
            layer = float_llama.layer_tensors(form, *tensor.tolist(), generator)
            state |= {f"{base}.{key}": value for key, value in layer.items()}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "ignore": ["lm_head", *ignore],
        "config_groups": {f"group_{i}": one for i, one in enumerate(groups)},
    }
    sizes = {"intermediate": float_llama.INTERMEDIATE}
    tiny_llama.save(path, state, quantization=quantization, **sizes)
    return state


def kernels(model):
    """layer -> the kernel of ours that runs it, None for one in 16 bits."""
    found = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            kernel = layer_table.tm_kernel_of(module)
            found[name.removeprefix("model.layers.")] = kernel and type(kernel).__name__
    return found


def test_a_golden_map_of_schemes(tmp_path):
    """The first layer in 16 bits, q, k and v in 16 bits beside a quantized o; FP8 attention, int4
    gates and ups, NVFP4 downs: each right by itself."""
    first = [
        f"model.layers.0.{part}_proj"
        for part in (
            *("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"),
            *("mlp.gate", "mlp.up", "mlp.down"),
        )
    ]
    second = [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]
    floats = {"o_proj": FP8, "down_proj": NVFP4}
    groups = [
        group([r"re:.*o_proj$"], FP8),
        group([r"re:.*down_proj$"], NVFP4),
        group([r"re:.*(gate|up)_proj$"]),
    ]
    state = write(tmp_path, floats, groups, [*first, *second])
    model = tiny_llama.load(tmp_path)
    assert kernels(model) == {
        "0.self_attn.qkv_proj": None,
        "0.self_attn.o_proj": None,
        "0.mlp.gate_up_proj": None,
        "0.mlp.down_proj": None,
        "1.self_attn.qkv_proj": None,
        "1.self_attn.o_proj": "TMFp8LinearKernel",
        "1.mlp.gate_up_proj": "TMWNA16LinearKernel",
        "1.mlp.down_proj": "TMNvFp4LinearKernel",
    }
    for form, name in ((FP8, "self_attn.o_proj"), (NVFP4, "mlp.down_proj")):
        layer = model.get_submodule(f"model.layers.1.{name}")
        width = tiny_llama.HIDDEN if form is FP8 else float_llama.INTERMEDIATE
        x = torch.randn(5, width).bfloat16()
        want, allowed = float_llama.product(form, state, [f"model.layers.1.{name}"], x)
        y = layer.quant_method.apply(layer, x)
        assert ((y.double() - want).abs() <= allowed).all()
    plain = model.model.layers[1].self_attn.qkv_proj
    parts = [state[f"{name}.weight"] for name in second]
    x = torch.randn(5, tiny_llama.HIDDEN).bfloat16()
    y = plain.quant_method.apply(plain, x).float()
    torch.testing.assert_close(y, x.float() @ torch.cat(parts).float().T, rtol=0.01, atol=0.03)


@pytest.mark.parametrize("part", ["self_attn.k_proj", "mlp.up_proj"])
def test_parts_of_one_layer_that_disagree_are_refused_by_name(tmp_path, part):
    """vLLM runs q, k and v, and gate and up, as one product. In 16 bits beside int4."""
    odd = f"model.layers.1.{part}"
    write(tmp_path, {}, [group(["Linear"])], [odd])
    fused, other = ("qkv_proj", "q_proj") if "attn" in part else ("gate_up_proj", "gate_proj")
    with pytest.raises(ValueError, match=rf"model\.layers\.1\.\w+\.{fused}") as caught:
        tiny_llama.load(tmp_path)
    beside = odd.rpartition(".")[0] + f".{other}"
    assert f"{beside} is quantized and {odd} is not" in str(caught.value)


@pytest.mark.parametrize(
    ("part", "held"), [("self_attn.v_proj", FP8), ("mlp.up_proj", FP8_KEPT), ("mlp.up_proj", NVFP4)]
)
def test_parts_of_different_kinds_are_refused_by_name(tmp_path, part, held):
    """Of which upstream takes the first one's for all: FP8 whose activations are kept beside FP8
    whose are not has the same tensors, and would be run as the latter."""
    odd = f"model.layers.1.{part}"
    floats = {odd: held, "_proj": FP8}
    groups = [group([odd], held), group(["Linear"], FP8)]
    if held is FP8:
        floats, groups = {odd: FP8}, [group([odd], FP8), group(["Linear"])]
    write(tmp_path, floats, groups, [])
    with pytest.raises(
        CheckpointError, match=r"vLLM runs them as one layer, model\.layers\.1"
    ) as caught:
        tiny_llama.load(tmp_path)
    other = odd.replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
    first, _, rest = str(caught.value).partition(f", and {odd} as ")
    assert first.startswith(f"{other} is held as weights ")
    assert rest.startswith("weights float" if held is not NVFP4 else "weights float4")


def test_a_part_that_the_checkpoint_holds_otherwise_is_refused_by_name(tmp_path):
    """Than its configuration says: the tensors themselves are of two kinds."""
    odd, other = (f"model.layers.0.self_attn.{part}_proj" for part in "vq")
    write(tmp_path, {}, [group(["Linear"])], [odd])
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["lm_head"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        tiny_llama.load(tmp_path)
    words = f"{other} is held as codes (weight_packed), and {odd} as plain weights, but"
    assert words in str(caught.value)
