# SPDX-License-Identifier: Apache-2.0
"""Routed experts of FP8 and FP4 checkpoints through vLLM's loader, against the oracle on the
checkpoint's own tensors: a tiny Qwen3-MoE, and a tiny gpt-oss with its own names, interleaved gates
and ups, and biases."""

import json

import float_llama
import pytest
import tiny_llama
import tiny_moe
import torch
from float_llama import Form
from safetensors.torch import save_file

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

from vllm_plugin_tm import layer_table
from vllm_plugin_tm.cli.__main__ import main
from vllm_plugin_tm.kernels import reference_moe
from vllm_plugin_tm.patch import apply
from vllm_plugin_tm.quantization.load_check import CheckpointError

pytestmark = pytest.mark.slow

EXPERTS, BLOCK = tiny_moe.EXPERTS_NAME, 32
KERNEL = "TMFloatExpertsKernel"
X_GROUP = 128  # upstream's, whatever the blocks are
_CT = "CompressedTensors{}MoEMethod"
FORMS = {
    "channel": Form("channel", "token", _CT.format("W8A8Fp8"), KERNEL),
    "static": Form("tensor", "tensor", _CT.format("W8A8Fp8"), KERNEL),
    "block": Form("block", "group", _CT.format("W8A8Fp8"), KERNEL, block=BLOCK),
    "fp8": Form("tensor", "token", "Fp8MoEMethod", KERNEL, "fp8"),
    "fp8 static": Form("tensor", "tensor", "Fp8MoEMethod", KERNEL, "fp8"),
    "fp8 block": Form("block", "group", "Fp8MoEMethod", KERNEL, "fp8", block=BLOCK),
    "mxfp4": Form("mxfp4", "none", _CT.format("W4A4Mxfp4"), KERNEL),
    "nvfp4": Form("nvfp4", "none", _CT.format("W4A4Nvfp4"), KERNEL),
    "modelopt fp8": Form("tensor", "tensor", "ModelOptFp8MoEMethod", KERNEL, "modelopt"),
    "modelopt nvfp4": Form("nvfp4", "none", "ModelOptNvFp4FusedMoE", KERNEL, "modelopt"),
}
IGNORE = {
    "compressed-tensors": tiny_moe.IGNORE,
    "modelopt": ("lm_head", "*self_attn*", "*mlp.gate"),
    # The fp8 method knows no patterns.
    "fp8": tuple(
        ["lm_head", "model.layers.0.mlp.gate"]
        + [f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"]
    ),
}


@pytest.fixture(autouse=True)
def _patched(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # vLLM's CPU worker does the same: there is no cache to empty.
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    apply.apply()
    yield
    apply.remove()


def write(path, form, spoil=None, seed=0):
    """A checkpoint of this form; its tensors."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in tiny_moe.tensors(seed=seed).items():
        base, _, leaf = name.rpartition(".")
        if leaf == "weight_shape":
            layer = float_llama.layer_tensors(form, *tensor.tolist(), generator)
            state |= {f"{base}.{key}": value for key, value in layer.items()}
        elif leaf not in ("weight_packed", "weight_scale"):
            state[name] = tensor
    if spoil is not None:
        spoil(state)
    quantization = float_llama.quantization(form, IGNORE[form.method])
    disk = state
    if form.method == "modelopt":
        disk = float_llama.as_modelopt(state, quantization["quant_algo"])
    tiny_moe.save(path, disk, quantization=quantization)
    return state


def from_disk(form, state):
    """The checkpoint's experts as the oracle wants them: (w13, w2)."""

    def part_scale(name, n, k):
        scale = state.get(f"{name}.weight_scale", state.get(f"{name}.weight_scale_inv"))
        if not form.fp8:
            return scale.view(torch.uint8)
        if form.weights == "block":
            blocks = scale.repeat_interleave(form.block, 0)
            return blocks.repeat_interleave(form.block // 4, 1)  # groups of 4 inputs
        return scale.reshape(-1, 1).expand(n, 1)

    def experts(*parts):
        codes, scales, channels = [], [], []
        for expert in range(tiny_moe.EXPERTS):
            names = [f"{EXPERTS}.{expert}.{part}_proj" for part in parts]
            leaf = "weight" if form.fp8 else "weight_packed"
            weights = [state[f"{name}.{leaf}"] for name in names]
            codes.append(torch.cat(weights))
            scales.append(
                torch.cat([part_scale(n, *w.shape) for n, w in zip(names, weights, strict=True)])
            )
            if form.weights == "nvfp4":
                divisors = [state[f"{name}.weight_global_scale"] for name in names]
                channels.append(
                    torch.cat(
                        [(1 / d).expand(len(w)) for d, w in zip(divisors, weights, strict=True)]
                    )
                )
        return reference_moe.Experts(
            torch.stack(codes),
            torch.stack(scales),
            channel_scale=torch.stack(channels) if channels else None,
            scale_type="e4m3" if form.weights == "nvfp4" else "e8m0",
            x_scale=torch.tensor([0.0061]) if form.rounding == "tensor" else None,
        )

    return experts("gate", "up"), experts("down")


def routing(tokens, experts, top_k):
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(tokens, top_k, generator=generator)
    ids = torch.rand(tokens, experts, generator=generator).topk(top_k, dim=1).indices
    return weights, ids.to(torch.int32)


def experts_of(model):
    """The module that holds the experts' weights."""
    (found,) = [m for m in model.modules() if layer_table.tm_kernel_of(m) is not None]
    return found


def check(layer, scheme, w13, w2, activation, hidden, experts, top_k, **more):
    x = torch.randn(9, hidden, generator=torch.Generator().manual_seed(2)).bfloat16()
    weights, ids = routing(9, experts, top_k)
    y = layer.quant_method.apply(layer, x, weights, ids, None, None)
    arguments = (scheme, x, weights, ids, w13, w2, activation)
    want = reference_moe.moe(*arguments, **more)
    allowed = reference_moe.moe_tolerance(*arguments, **more)
    assert ((y.double() - want).abs() <= allowed).all()


@pytest.mark.parametrize("name", FORMS)
def test_every_form_loads_runs_right_and_the_table_shows_it(tmp_path, name):
    form = FORMS[name]
    state = write(tmp_path, form)
    model = tiny_llama.load(tmp_path)
    ours, *rest = layer_table.last()
    assert (ours.count, ours.on_tm, ours.kernel, ours.scheme) == (1, True, KERNEL, form.scheme)
    assert ours.group_size == form.group
    assert not any(row.on_tm for row in rest)
    scheme = "fp8" if form.fp8 else "fp4"
    more = {"x_rounding": form.rounding, "x_group_size": X_GROUP} if form.fp8 else {}
    check(
        experts_of(model),
        scheme,
        *from_disk(form, state),
        reference_moe.Activation(),
        tiny_moe.HIDDEN,
        tiny_moe.EXPERTS,
        tiny_moe.TOP_K,
        **more,
    )


@pytest.mark.parametrize("name", FORMS)
def test_inspect_says_what_loading_does(tmp_path, capsys, name):
    form = FORMS[name]
    write(tmp_path, form)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    found = {module["module"]: module for module in json.loads(capsys.readouterr().out)}
    experts = {key: module for key, module in found.items() if key.startswith(EXPERTS)}
    assert len(experts) == 3 * tiny_moe.EXPERTS
    kernel = "TM fp8" if form.fp8 else "TM fp4"
    assert {(module["kernel"], module["why"]) for module in experts.values()} == {(kernel, "")}


@pytest.mark.parametrize("name", ["fp8 block", "static", "mxfp4", "nvfp4", "modelopt nvfp4"])
def test_dummy_weights_are_numbers(tmp_path, name):
    write(tmp_path, FORMS[name])
    layer = experts_of(tiny_llama.load(tmp_path, load_format="dummy"))
    weights, ids = routing(3, tiny_moe.EXPERTS, tiny_moe.TOP_K)
    x = torch.randn(3, tiny_moe.HIDDEN).bfloat16()
    assert bool(layer.quant_method.apply(layer, x, weights, ids, None, None).isfinite().all())


def missing(leaf, part="up"):
    return lambda state: state.pop(f"{EXPERTS}.2.{part}_proj.{leaf}")


def first(leaf, value):
    def spoil(state):
        tensor = state[f"{EXPERTS}.2.up_proj.{leaf}"]
        flat = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
        flat.view(-1)[0] = value

    return spoil


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("channel", missing("weight"), r"missing.*\n.*experts\.2\.up_proj\.weight \("),
        ("channel", missing("weight_scale"), r"missing.*\n.*experts\.2\.up_proj\.weight_scale"),
        ("fp8", missing("weight_scale"), r"missing.*\n.*experts\.2\.up_proj\.weight_scale"),
        ("fp8 block", missing("weight_scale_inv"), r"missing.*\n.*2\.up_proj\.weight_scale_inv"),
        ("mxfp4", missing("weight_packed"), r"missing.*\n.*experts\.2\.up_proj\.weight_packed"),
        ("nvfp4", missing("weight_global_scale"), r"missing.*\n.*2\.up_proj\.weight_global_scale"),
        ("modelopt fp8", missing("weight_scale"), r"missing.*\n.*2\.up_proj\.weight_scale \("),
        ("modelopt fp8", missing("input_scale", "down"), r"missing.*\n.*down_proj\.input_scale"),
        (
            "modelopt nvfp4",
            missing("weight_global_scale"),
            r"missing.*\n.*weight_scale_2",
        ),
        (
            "modelopt nvfp4",
            first("weight_global_scale", 0.0),
            r"w13_weight_scale_2: expected pos",
        ),
        ("channel", first("weight", 0x7F), r"expert 2\.w13_weight: 1 of .* are not a number"),
        ("channel", first("weight_scale", float("nan")), r"expert 2\.w13_weight_scale: 1 of"),
        ("mxfp4", first("weight_scale", 0xFF), r"expert 2\.w13_weight_scale: 1 of"),
        ("nvfp4", first("weight_global_scale", 0.0), r"w13_weight_global_scale: expected positive"),
    ],
)
def test_damage_is_refused_by_name(tmp_path, name, spoil, message):
    write(tmp_path, FORMS[name], spoil)
    with pytest.raises((CheckpointError, ValueError), match=message):
        tiny_llama.load(tmp_path)


@pytest.mark.parametrize("name", ["channel", "fp8 block", "modelopt fp8"])
def test_where_we_decline_the_refusal_has_our_reason(tmp_path, monkeypatch, name):
    """Upstream would construct the layer and fail when its weights are there."""
    monkeypatch.setenv("VLLM_PLUGIN_TM_SCHEMES", "w4a16")
    write(tmp_path, FORMS[name])
    with pytest.raises(NotImplementedError, match=r"fp8 is not among the schemes to take"):
        tiny_llama.load(tmp_path)


GPT = {"hidden": 64, "intermediate": 96, "experts": 4, "top_k": 2, "heads": 2, "head_dim": 32}


def write_gpt_oss(path, seed=0):
    """A gpt-oss of one layer, as its publishers have it: experts in blocks of bytes [E, rows,
    groups, 16] with gate and up rows in turn; its tensors."""
    generator = torch.Generator().manual_seed(seed)
    h, i, e = GPT["hidden"], GPT["intermediate"], GPT["experts"]
    width = GPT["heads"] * GPT["head_dim"]

    def dense(*shape):
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16()

    def byte(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator).to(torch.uint8)

    layer = "model.layers.0"
    state = {
        "model.embed_tokens.weight": dense(256, h),
        "lm_head.weight": dense(256, h),
        "model.norm.weight": torch.ones(h).bfloat16(),
        f"{layer}.input_layernorm.weight": torch.ones(h).bfloat16(),
        f"{layer}.post_attention_layernorm.weight": torch.ones(h).bfloat16(),
        f"{layer}.self_attn.sinks": dense(GPT["heads"]),
        f"{layer}.mlp.router.weight": dense(e, h),
        f"{layer}.mlp.router.bias": dense(e),
    }
    for name, n, k in (("q", width, h), ("k", width, h), ("v", width, h), ("o", h, width)):
        state[f"{layer}.self_attn.{name}_proj.weight"] = dense(n, k)
        state[f"{layer}.self_attn.{name}_proj.bias"] = dense(n)
    for name, n, k in (("gate_up", 2 * i, h), ("down", h, i)):
        base = f"{layer}.mlp.experts.{name}_proj"
        state[f"{base}_blocks"] = byte(0, 256, e, n, k // 32, 16)
        state[f"{base}_scales"] = byte(119, 123, e, n, k // 32)
        state[f"{base}_bias"] = dense(e, n)
    config = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": h,
        "intermediate_size": i,
        "num_local_experts": e,
        "num_experts_per_tok": GPT["top_k"],
        "num_hidden_layers": 1,
        "num_attention_heads": GPT["heads"],
        "num_key_value_heads": GPT["heads"],
        "head_dim": GPT["head_dim"],
        "layer_types": ["full_attention"],
        "sliding_window": 128,
        "vocab_size": 256,
        "max_position_embeddings": 256,
        "initial_context_length": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "swiglu_limit": 7.0,
        "hidden_act": "silu",
        "attention_bias": True,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return state


def test_gpt_oss(tmp_path):
    """Gates and ups are told apart, biases and the activation's clamps are there."""
    state = write_gpt_oss(tmp_path)
    model = tiny_llama.load(tmp_path)
    ours = layer_table.last()[0]
    assert (ours.count, ours.kernel, ours.scheme) == (1, KERNEL, "GptOssMxfp4MoEMethod")

    def experts(name, order):
        base = f"model.layers.0.mlp.experts.{name}_proj"
        codes, scale, bias = (state[f"{base}_{leaf}"] for leaf in ("blocks", "scales", "bias"))
        codes, scale, bias = (order(tensor) for tensor in (codes.flatten(2), scale, bias))
        return reference_moe.Experts(codes, scale, bias=bias)

    w13 = experts("gate_up", lambda rows: torch.cat((rows[:, 0::2], rows[:, 1::2]), dim=1))
    w2 = experts("down", lambda rows: rows)
    activation = reference_moe.Activation("swiglu", alpha=1.702, beta=1.0, limit=7.0)
    sizes = (GPT["hidden"], GPT["experts"], GPT["top_k"])
    check(experts_of(model), "fp4", w13, w2, activation, *sizes)
