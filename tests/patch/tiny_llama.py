# SPDX-License-Identifier: Apache-2.0
"""A Llama of a few kilobytes with quantized weights, written as a checkpoint and loaded by vLLM's
own loader in this process. No tokenizer, no server: tests/e2e has those."""

import functools
import gc
import json
import tempfile

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file

HIDDEN, HEADS, KV_HEADS, LAYERS, VOCABULARY = 128, 4, 2, 2, 256


def tensors(
    group=32,
    symmetric=True,
    intermediate=256,
    seed=0,
    dtype=torch.bfloat16,
    bits=4,
    packed=True,
    static=None,
    tensor=False,
):
    """The checkpoint's tensors, a new set for every seed.

    `packed`: pack-quantized weights, else int-quantized, a byte each. `tensor`: one scale for each
    matrix. `static`: "symmetric" or "asymmetric" scales of activations beside them.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN, generator=generator),
        "lm_head.weight": torch.randn(VOCABULARY, HIDDEN, generator=generator),
        "model.norm.weight": torch.ones(HIDDEN),
    }

    def quantized(name, n, k):
        groups = 1 if group == -1 else k // group
        most = 1 << (bits - 1)
        codes = torch.randint(-most, most, (n, k), dtype=torch.int8, generator=generator)
        shape = (1,) if tensor else (n, groups)
        scale = torch.rand(shape, generator=generator) * 0.02 + 0.005
        state[f"{name}.weight_scale"] = scale * 8 / most
        if static:
            state[f"{name}.input_scale"] = torch.tensor([0.03])
        if static == "asymmetric":
            state[f"{name}.input_zero_point"] = torch.tensor([-21], dtype=torch.int8)
        if not packed:
            state[f"{name}.weight"] = codes
            return
        state[f"{name}.weight_packed"] = pack_to_int32(codes, bits)
        state[f"{name}.weight_shape"] = torch.tensor([n, k])
        if not symmetric:
            zeros = torch.randint(-2, 2, (n, groups), dtype=torch.int8, generator=generator)
            words = pack_to_int32(zeros, bits, packed_dim=0).contiguous()
            state[f"{name}.weight_zero_point"] = words

    kv = HIDDEN // HEADS * KV_HEADS
    for index in range(LAYERS):
        layer = f"model.layers.{index}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{layer}.{norm}.weight"] = torch.ones(HIDDEN)
        for name, rows in (("q", HIDDEN), ("k", kv), ("v", kv), ("o", HIDDEN)):
            quantized(f"{layer}.self_attn.{name}_proj", rows, HIDDEN)
        quantized(f"{layer}.mlp.gate_proj", intermediate, HIDDEN)
        quantized(f"{layer}.mlp.up_proj", intermediate, HIDDEN)
        quantized(f"{layer}.mlp.down_proj", HIDDEN, intermediate)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}


def int8_activations(static=None, symmetric=True):
    """The configuration of dynamic activations per token, or of static ones."""
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": symmetric if static is None else static == "symmetric",
        "strategy": "tensor" if static else "token",
        "dynamic": static is None,
    }


def save(
    path,
    state,
    group=32,
    symmetric=True,
    intermediate=256,
    activations=None,
    quantization=None,
    bits=4,
    packed=True,
    tensor=False,
):
    """Writes config.json and model.safetensors into `path`; `quantization` replaces the
    compressed-tensors configuration that the other arguments describe."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "tensor" if tensor else "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group,
        "dynamic": False,
    }
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": intermediate,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "quantization_config": quantization
        or {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized" if packed else "int-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": scheme},
        },
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def engine_config(path, **options):
    """vLLM's configuration for a model at `path`."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(path), skip_tokenizer_init=True, max_model_len=64, enforce_eager=True, **options
    ).create_engine_config()


@functools.cache
def _keep_imports_out_of_collections():
    """vLLM collects garbage at every load; what the first one imported needs no second look."""
    gc.collect()
    gc.freeze()


def load(path, **options):
    """The model, loaded by whatever loader vLLM has registered now."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.model_executor.model_loader import get_model

    config = engine_config(path, **options)
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            with tempfile.NamedTemporaryFile() as rendezvous:
                address = f"file://{rendezvous.name}.rendezvous"
            init_distributed_environment(1, 0, address, 0, "gloo")
        # Anew for each model: only those with experts have a group of expert parallelism.
        destroy_model_parallel()
        ensure_model_parallel_initialized(1, 1)
        model = get_model(vllm_config=config)
    _keep_imports_out_of_collections()
    return model
