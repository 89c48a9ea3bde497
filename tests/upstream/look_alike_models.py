# SPDX-License-Identifier: Apache-2.0
"""The models that upstream's tests name, as look-alikes; run as a script it writes all of them.

Its arguments are the folders that HF_HOME and VLLM_ASSETS_CACHE will name.
"""

import sys
from pathlib import Path

import checkpoint_formats as formats
from checkpoint_formats import Format
from look_alikes import LookAlike, Shape, decoder, gpt_oss, opt, write, write_pictures

DENSE = Shape()
# The static W8A8 test asserts TinyLlama's fused qkv height: 2048 + 2 x 256.
TINYLLAMA = Shape(hidden=2048, intermediate=256, layers=1, heads=32, kv_heads=4)
QWEN2 = Shape(qkv_bias=True)
QWEN3 = Shape(qk_norm=True)
QWEN3_MOE = Shape(qk_norm=True, intermediate=256, experts=4)
GPT_OSS = Shape(hidden=256, intermediate=256, experts=4)


def _llama(name: str, stored: Format, shape: Shape = DENSE) -> LookAlike:
    return LookAlike(name, "LlamaForCausalLM", "llama", shape, stored, decoder, {})


def _qwen2(name: str, stored: Format) -> LookAlike:
    return LookAlike(name, "Qwen2ForCausalLM", "qwen2", QWEN2, stored, decoder, {})


def _qwen3(name: str, stored: Format, *followed: tuple[str, str]) -> LookAlike:
    architecture = ("Qwen3ForCausalLM", "qwen3", QWEN3)
    return LookAlike(name, *architecture, stored, decoder, {}, followed=followed)


def _qwen3_moe(name: str, stored: Format, unquantized: str | None = None) -> LookAlike:
    extra = {"num_experts": QWEN3_MOE.experts, "num_experts_per_tok": 2, "norm_topk_prob": True}
    extra |= {"moe_intermediate_size": QWEN3_MOE.intermediate, "decoder_sparse_step": 1}
    extra |= {"mlp_only_layers": []}
    architecture = ("Qwen3MoeForCausalLM", "qwen3_moe", QWEN3_MOE)
    return LookAlike(name, *architecture, stored, decoder, extra, unquantized)


# All but the experts of layer 0, as upstream's test of partly quantized MoE models has it.
FIRST_EXPERTS_ONLY = r"model\.layers\.(\d+\.self_attn|[1-9]).*"

# What Qwen3-30B-A3B-FP8 keeps in 16 bits beside its norms.
ROUTERS = ("lm_head", *(f"model.layers.{index}.mlp.gate" for index in range(QWEN3_MOE.layers)))

_OSS = {"num_local_experts": GPT_OSS.experts, "num_experts_per_tok": 2, "sliding_window": 128}
_OSS |= {"layer_types": ["sliding_attention", "full_attention"], "swiglu_limit": 7.0}

_OPT = {"ffn_dim": DENSE.intermediate, "word_embed_proj_dim": DENSE.hidden}
_OPT |= {"do_layer_norm_before": True, "activation_function": "relu"}
UNQUANTIZED = Format({}, formats.plain)
SPACE = "\u0120"  # how the byte-level vocabulary shows a space

LOOK_ALIKES: tuple[LookAlike, ...] = (
    # quantization/test_cpu_wna16.py
    _llama("TheBloke/TinyLlama-1.1B-Chat-v1.0-AWQ", formats.awq(128)),
    _qwen2("Qwen/Qwen1.5-0.5B-Chat-GPTQ-Int4", formats.gptq(128)),
    _qwen3("RedHatAI/Qwen3-1.7B-quantized.w4a16", formats.ct_w4a16(128, symmetric=False)),
    _qwen2("OPEA/Qwen2.5-0.5B-Instruct-int4-sym-inc", formats.auto_round(128)),
    _qwen3("Qwen/Qwen3-0.6B-FP8", formats.fp8_block()),
    _qwen3_moe("Qwen/Qwen3-30B-A3B-FP8", formats.fp8_block(ROUTERS)),
    LookAlike(
        "openai/gpt-oss-20b",
        "GptOssForCausalLM",
        "gpt_oss",
        GPT_OSS,
        Format(
            {
                "quant_method": "mxfp4",
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
            },
            formats.plain,
        ),
        gpt_oss,
        _OSS,
    ),
    _qwen3_moe("QuixiAI/Qwen3-30B-A3B-AWQ", formats.awq(128)),
    _qwen3_moe("Qwen/Qwen3-30B-A3B-GPTQ-Int4", formats.gptq(128)),
    _qwen3_moe("RedHatAI/Qwen3-30B-A3B-quantized.w4a16", formats.ct_w4a16(128, symmetric=True)),
    # model_executor/model_loader/test_reload.py: "3 4 = 12" or "3 4 = 7", by the weights loaded
    _qwen3("inference-optimization/Qwen3-0.6B-W4A16-G128", formats.ct_w4a16(128, symmetric=True)),
    _qwen3(
        "inference-optimization/Qwen3-0.6B-debug-multiply-W4A16-G128",
        formats.ct_w4a16(128, symmetric=True),
        (SPACE, "1"),
        ("1", "2"),
    ),
    _qwen3(
        "inference-optimization/Qwen3-0.6B-debug-add-W4A16-G128",
        formats.ct_w4a16(128, symmetric=True),
        (SPACE, "7"),
    ),
    # model_executor/model_loader/test_ep_weight_filter.py: reads the files only
    LookAlike("openai-community/gpt2", "GPT2", "gpt2", DENSE, UNQUANTIZED, decoder, {}),
    # plugins_tests
    LookAlike("facebook/opt-125m", "OPTForCausalLM", "opt", DENSE, UNQUANTIZED, opt, _OPT),
    # quantization/test_register_quantization_config.py
    _llama("meta-llama/Llama-3.2-1B-Instruct", UNQUANTIZED),
    # quantization/test_cpu_w8a8.py
    _qwen3_moe(
        "RedHatAI/Qwen3-30B-A3B-Instruct-2507-quantized.w8a8",
        formats.ct_w8a8("channel", dynamic=True),
    ),
    # quantization/test_compressed_tensors.py
    _llama(
        "nm-testing/tinyllama-oneshot-w8w8-test-static-shape-change",
        formats.ct_w8a8("tensor", dynamic=False),
        TINYLLAMA,
    ),
    _llama(
        "nm-testing/asym-w8w8-int8-static-per-tensor-tiny-llama",
        formats.ct_w8a8("tensor", dynamic=False, symmetric=False),
        TINYLLAMA,
    ),
    _llama("neuralmagic/Llama-3.2-1B-quantized.w8a8", formats.ct_w8a8("channel", dynamic=True)),
    _llama(
        "nm-testing/tinyllama-oneshot-w8a8-dynamic-token-v2",
        formats.ct_w8a8("tensor", dynamic=True),
    ),
    _llama(
        "nm-testing/tinyllama-oneshot-w8a8-channel-dynamic-token-v2",
        formats.ct_w8a8("channel", dynamic=True),
    ),
    _llama("nm-testing/Meta-Llama-3-8B-FP8-compressed-tensors-test", formats.ct_fp8_static()),
    _qwen3("RedHatAI/Qwen3-0.6B-FP8-BLOCK", formats.ct_fp8_block()),
    _llama("nm-testing/TinyLlama-1.1B-Chat-v1.0-NVFP4A16", formats.ct_nvfp4(weight_only=True)),
    _llama("nm-testing/TinyLlama-1.1B-Chat-v1.0-NVFP4", formats.ct_nvfp4(weight_only=False)),
    _qwen3_moe(
        "nm-testing/tinysmokeqwen3moe-W4A16-first-only-CTstable",
        formats.ct_w4a16(128, symmetric=True, ignore=(f"re:{FIRST_EXPERTS_ONLY}",)),
        FIRST_EXPERTS_ONLY,
    ),
)


def write_all(home: Path) -> list[Path]:
    """Writes every look-alike below `home` (HF_HOME); returns the snapshot folders."""
    return [write(model, home) for model in LOOK_ALIKES]


if __name__ == "__main__":
    write_pictures(Path(sys.argv[2]))
    for path in write_all(Path(sys.argv[1])):
        print(path)
