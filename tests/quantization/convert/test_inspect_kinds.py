# SPDX-License-Identifier: Apache-2.0
"""`vllm-tm inspect` on what the converter does not write: FP4, FP8 of tensors and under kept
activations, AWQ, and modules of different kinds beside each other."""

import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import save_file

from vllm_plugin_tm import machine
from vllm_plugin_tm.cli import main
from vllm_plugin_tm.kernels import reference_float
from vllm_plugin_tm.quantization.support_matrix import Machine

N, K = 128, 256
PER_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
FP4 = {"num_bits": 4, "type": "float", "symmetric": True}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
# Weights' arguments, format, whether activations are rounded; what is shown, and where it runs:
# as a linear layer, as an expert.
KINDS = {
    "nvfp4": (
        FP4 | {"strategy": "tensor_group", "group_size": 16},
        ("nvfp4-pack-quantized", False, "nvfp4 g16", "TM fp4", "TM fp4"),
    ),
    "mxfp4": (
        FP4 | {"strategy": "group", "group_size": 32},
        ("mxfp4-pack-quantized", False, "mxfp4 g32", "TM fp4", "TM fp4"),
    ),
    "fp8-tensor": (
        FP8 | {"strategy": "tensor"},
        ("float-quantized", True, "fp8 tensor", "TM fp8", "TM fp8"),
    ),
    "fp8-kept": (
        FP8 | {"strategy": "channel"},
        ("float-quantized", False, "fp8a16 channel", "TM fp8", "upstream"),
    ),
    "int4-packed": (
        INT4 | {"symmetric": True},
        ("pack-quantized", True, "w4a8 g32", "TM w4a8", "TM w4a8"),
    ),
    # Upstream has no method for such experts.
    "int4-packed-zeros": (
        INT4 | {"symmetric": False},
        ("pack-quantized", True, "w4a8 g32 asymmetric", "TM w4a8", "upstream"),
    ),
    "int8-tensor": (
        {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor"},
        ("int-quantized", True, "w8a8 tensor", "TM w8a8", "TM w8a8"),
    ),
}
LINEAR, EXPERT = "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.experts.0.up_proj"
PLAIN = "model.layers.0.self_attn.o_proj"


def tensors(kind, weight):
    """One matrix as the library holds it; scales of the format's own dtypes."""
    weights, (form, *_) = KINDS[kind]
    largest = weight.abs().amax()
    given = {"weight": weight}
    if kind == "nvfp4":
        divisor = (reference_float.E4M3_MOST * 6 / largest).reshape(1)
        ranges = weight.view(N, -1, 16).abs().amax(-1) / 6
        scale = (ranges * divisor).to(torch.float8_e4m3fn).float()
        given |= {"weight_scale": scale, "weight_global_scale": divisor}
    elif kind == "mxfp4":
        ranges = weight.view(N, -1, 32).abs().amax(-1) / 6
        given["weight_scale"] = torch.exp2(ranges.log2().ceil())
    elif kind.startswith("int4"):
        groups = weight.view(N, -1, 32)
        given["weight_scale"] = groups.abs().amax(-1) / 7
        if kind == "int4-packed-zeros":
            low = groups.amin(-1).clamp(max=0)
            given["weight_scale"] = (groups.amax(-1).clamp(min=0) - low) / 15
            zeros = (-8 - low / given["weight_scale"]).round().clamp(-8, 7)
            given["weight_zero_point"] = zeros.to(torch.int8)
    elif kind == "fp8-kept":
        given["weight_scale"] = weight.abs().amax(-1, keepdim=True) / reference_float.E4M3_MOST
    else:
        most = reference_float.E4M3_MOST if kind == "fp8-tensor" else 127
        given["weight_scale"] = (largest / most).reshape(1)
    scheme = QuantizationScheme(targets=["Linear"], weights=scheme_weights(weights, kind))
    return BaseCompressor.get_value_from_registry(form).compress(given, scheme)


def scheme_weights(weights, kind):
    return weights | ({"scale_dtype": torch.uint8} if kind == "mxfp4" else {})


def write(folder, kind):
    """A checkpoint of three matrices, the first in 16 bits, and what it was made of."""
    weights, (form, rounded, *_) = KINDS[kind]
    generator = torch.Generator().manual_seed(0)
    plain = {
        f"{name}.weight": torch.randn(N, K, generator=generator).bfloat16()
        for name in (PLAIN, LINEAR, EXPERT)
    }
    state = {f"{PLAIN}.weight": plain[f"{PLAIN}.weight"]}
    for name in (LINEAR, EXPERT):
        made = tensors(kind, plain[f"{name}.weight"].float())
        state |= {f"{name}.{leaf}": tensor.contiguous() for leaf, tensor in made.items()}
    activations = None
    if rounded:
        activations = PER_TOKEN | {"type": weights["type"]}
    group = {"targets": ["re:.*layers.1.*"], "weights": weights, "input_activations": activations}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "ignore": [PLAIN],
        "config_groups": {"group_0": group | {"format": form}},
    }
    for path, held, config in (
        (folder / "src", plain, {}),
        (folder / "dst", state, {"quantization_config": quantization}),
    ):
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
        save_file(held, path / "model.safetensors", metadata={"format": "pt"})
    return folder / "dst"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_told_by_its_name_and_kernel(tmp_path, capsys, monkeypatch, kind):
    target = write(tmp_path, kind)
    monkeypatch.setattr(machine, "detect", lambda: Machine("cpu", "avx2"))
    assert main(["inspect", str(target), "--source", str(tmp_path / "src"), "--json"]) == 0
    found = {module["module"]: module for module in json.loads(capsys.readouterr().out)}
    assert set(found) == {PLAIN, LINEAR, EXPERT}
    _, (_, _, name, linear, expert) = KINDS[kind]
    for module, kernel in ((LINEAR, linear), (EXPERT, expert)):
        assert found[module]["scheme"] == name
        assert found[module]["kernel"] == kernel
        assert bool(found[module]["why"]) == (kernel == "upstream")
        assert found[module]["shape"] == [N, K]
        # Codes of 4 bits are off by an eighth at most, and a tenth in norm.
        assert 1e-3 < found[module]["error"]["relative"] < 0.15
    assert (found[PLAIN]["scheme"], found[PLAIN]["kernel"]) == ("bfloat16", "upstream")


def write_stacked(folder, scales=(4, 128, 4)):
    """A layer as gpt-oss holds it: a router and attention in 16 bits, experts in one tensor for
    each projection, gates and ups in turns."""
    prefix = "model.layers.0"
    state = {
        f"{prefix}.self_attn.o_proj.weight": torch.zeros(128, 128, dtype=torch.bfloat16),
        f"{prefix}.mlp.router.weight": torch.zeros(4, 128, dtype=torch.bfloat16),
        f"{prefix}.mlp.experts.gate_up_proj_blocks": torch.zeros(4, 128, 4, 16, dtype=torch.uint8),
        f"{prefix}.mlp.experts.gate_up_proj_scales": torch.zeros(scales, dtype=torch.uint8),
        f"{prefix}.mlp.experts.gate_up_proj_bias": torch.zeros(4, 128, dtype=torch.bfloat16),
        f"{prefix}.mlp.experts.down_proj_blocks": torch.zeros(4, 128, 2, 16, dtype=torch.uint8),
        f"{prefix}.mlp.experts.down_proj_scales": torch.zeros(4, 128, 2, dtype=torch.uint8),
    }
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_experts_in_one_tensor_are_told_one_by_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine, "detect", lambda: Machine("cpu", "avx2"))
    write_stacked(tmp_path)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    found = {module["module"]: module for module in json.loads(capsys.readouterr().out)}
    mlp = "model.layers.0.mlp"
    want = {
        "model.layers.0.self_attn.o_proj": ("bfloat16", [128, 128], 128 * 128 * 2, "upstream"),
        f"{mlp}.router": ("bfloat16", [4, 128], 4 * 128 * 2, "upstream"),
    }
    for expert in range(4):
        for name, k in (("gate_up_proj", 128), ("down_proj", 64)):
            nbytes = 128 * (k // 2 + k // 32)
            want[f"{mlp}.experts.{expert}.{name}"] = ("mxfp4 g32", [128, k], nbytes, "TM fp4")
    fields = ("scheme", "shape", "nbytes", "kernel")
    assert {name: tuple(each[f] for f in fields) for name, each in found.items()} == want


def test_stacked_experts_of_other_shapes_are_refused(tmp_path, capsys):
    write_stacked(tmp_path, scales=(4, 128, 3))
    assert main(["inspect", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "model.layers.0.mlp.experts.gate_up_proj: blocks (4, 128, 4, 16)" in said
    assert "scales (4, 128, 3)" in said
