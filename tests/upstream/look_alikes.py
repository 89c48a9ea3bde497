# SPDX-License-Identifier: Apache-2.0
"""Makes tiny seeded checkpoints under the names of hub models, in a local hub cache.

Each has the architecture and the quantization config of the model it stands for, and nothing
else of it: the weights are random, the tokenizer knows bytes. Which models there are is in
look_alike_models.py, how a layer is stored in checkpoint_formats.py.
"""

import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoint_formats as formats
import torch
from checkpoint_formats import Format, Tensors
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

REVISION = "0" * 40  # the commit that the hub cache shows; the models have no history
VOCABULARY = 320
POSITIONS = 2048


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes; experts 0 is a dense MLP, qk_norm and qkv_bias are Qwen's extras."""

    hidden: int = 256
    intermediate: int = 512
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head: int = 64
    experts: int = 0
    qk_norm: bool = False
    qkv_bias: bool = False


@dataclass(frozen=True)
class LookAlike:
    """A model: hub name, architecture (config.json's) with its shape, and how layers are stored;
    those whose name matches the regular expression `unquantized` are stored in bf16. `followed`
    are pairs of characters: the model finds the second likely after the first."""

    name: str
    architecture: str
    model_type: str
    shape: Shape
    format: Format
    build: Callable[["LookAlike", torch.Generator], Tensors]
    extra: dict[str, Any]
    unquantized: str | None = None
    followed: tuple[tuple[str, str], ...] = ()

    def layer(self, name: str, n: int, k: int, rng: torch.Generator) -> Tensors:
        """The tensors of the linear layer `name` with weight [n, k], under their full names."""
        left_out = self.unquantized is not None and re.match(self.unquantized, name)
        stored = (formats.plain if left_out else self.format.layer)(n, k, rng)
        return _named(name, stored)


def decoder(model: LookAlike, rng: torch.Generator) -> Tensors:
    """The tensors of a Llama-like model. The embedding is large beside the layers' output, so that
    greedy decoding does not hang on rounding."""
    shape = model.shape
    tensors = _ends(model, rng)
    for index in range(shape.layers):
        prefix = f"model.layers.{index}"
        tensors |= _norms(prefix, shape.hidden)
        tensors |= _attention(f"{prefix}.self_attn", model, rng)
        if shape.experts:
            router = torch.randn(shape.experts, shape.hidden, generator=rng) * 0.1
            tensors[f"{prefix}.mlp.gate.weight"] = router.bfloat16()
            for expert in range(shape.experts):
                tensors |= _mlp(f"{prefix}.mlp.experts.{expert}", model, rng)
        else:
            tensors |= _mlp(f"{prefix}.mlp", model, rng)
    return tensors


def gpt_oss(model: LookAlike, rng: torch.Generator) -> Tensors:
    """gpt-oss: attention in bf16 with biases and sinks, experts in MXFP4 with biases."""
    shape = model.shape
    hidden, inner, experts = shape.hidden, shape.intermediate, shape.experts
    tensors = _ends(model, rng)
    for index in range(shape.layers):
        prefix = f"model.layers.{index}"
        tensors |= _norms(prefix, hidden)
        widths = {"q": shape.heads, "k": shape.kv_heads, "v": shape.kv_heads}
        for name, heads in widths.items():
            rows = heads * shape.head
            stored = formats.plain(rows, hidden, rng) | {"bias": torch.zeros(rows).bfloat16()}
            tensors |= _named(f"{prefix}.self_attn.{name}_proj", stored)
        stored = formats.plain(hidden, shape.heads * shape.head, rng)
        stored["bias"] = torch.zeros(hidden).bfloat16()
        tensors |= _named(f"{prefix}.self_attn.o_proj", stored)
        tensors[f"{prefix}.self_attn.sinks"] = torch.zeros(shape.heads).bfloat16()
        router = formats.plain(experts, hidden, rng) | {"bias": torch.zeros(experts).bfloat16()}
        tensors |= _named(f"{prefix}.mlp.router", router)
        for name, rows, k in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            stacked = [formats.mxfp4(rows, k, rng) for _ in range(experts)]
            for part in ("blocks", "scales"):
                stack = torch.stack([one[part] for one in stacked])
                tensors[f"{prefix}.mlp.experts.{name}_{part}"] = stack
            bias = torch.zeros(experts, rows).bfloat16()
            tensors[f"{prefix}.mlp.experts.{name}_bias"] = bias
    return tensors


def opt(model: LookAlike, rng: torch.Generator) -> Tensors:
    """OPT, unquantized."""
    hidden, inner, root = model.shape.hidden, model.shape.intermediate, "model.decoder"
    positions = POSITIONS + 2  # OPT's offset
    tensors = {
        f"{root}.embed_tokens.weight": formats.plain(VOCABULARY, hidden, rng)["weight"],
        f"{root}.embed_positions.weight": formats.plain(positions, hidden, rng)["weight"],
    }
    linear = {f"self_attn.{name}_proj": (hidden, hidden) for name in ("q", "k", "v", "out")}
    linear |= {"fc1": (inner, hidden), "fc2": (hidden, inner)}
    norms = [f"{root}.final_layer_norm"]
    for index in range(model.shape.layers):
        prefix = f"{root}.layers.{index}"
        norms += [f"{prefix}.self_attn_layer_norm", f"{prefix}.final_layer_norm"]
        for name, (n, k) in linear.items():
            stored = formats.plain(n, k, rng) | {"bias": torch.zeros(n).bfloat16()}
            tensors |= _named(f"{prefix}.{name}", stored)
    for name in norms:
        tensors |= _named(name, {"weight": torch.ones(hidden).bfloat16()})
        tensors |= _named(name, {"bias": torch.zeros(hidden).bfloat16()})
    return tensors


def write(model: LookAlike, home: Path) -> Path:
    """Writes one model as the hub cache stores it and returns its snapshot folder."""
    repository = home / "hub" / f"models--{model.name.replace('/', '--')}"
    folder = repository / "snapshots" / REVISION
    folder.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(zlib.crc32(model.name.encode()))
    tensors = model.build(model, rng)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(model), indent=1))
    _write_tokenizer(folder)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(REVISION)
    return folder


def _config(model: LookAlike) -> dict[str, Any]:
    shape = model.shape
    config = {
        "architectures": [model.architecture],
        "model_type": model.model_type,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head,
        "hidden_act": "silu",
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "dtype": "bfloat16",
    }
    if model.format.config:
        config["quantization_config"] = model.format.config
    return config | model.extra


def _vocabulary() -> dict[str, int]:
    """One token per byte, by the letter that the byte-level pre-tokenizer shows it as."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {letter: index for index, letter in enumerate(letters)} | {"<s>": 256, "</s>": 257}


def _write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": POSITIONS} | names
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _ends(model: LookAlike, rng: torch.Generator) -> Tensors:
    hidden = model.shape.hidden
    embedding = torch.randn(VOCABULARY, hidden, generator=rng).bfloat16()
    # A token is most likely followed by itself: the residual stream is mostly its embedding.
    head = (embedding * 0.1).clone()
    vocabulary = _vocabulary()
    for before, after in model.followed:
        head[vocabulary[after]] = embedding[vocabulary[before]] * 0.2
    return {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": torch.ones(hidden).bfloat16(),
        "lm_head.weight": head,
    }


def _norms(prefix: str, hidden: int) -> Tensors:
    names = ("input_layernorm", "post_attention_layernorm")
    return {f"{prefix}.{name}.weight": torch.ones(hidden).bfloat16() for name in names}


def _attention(prefix: str, model: LookAlike, rng: torch.Generator) -> Tensors:
    shape = model.shape
    query, key = shape.heads * shape.head, shape.kv_heads * shape.head
    tensors = model.layer(f"{prefix}.o_proj", shape.hidden, query, rng)
    for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
        tensors |= model.layer(f"{prefix}.{name}", rows, shape.hidden, rng)
        if shape.qkv_bias:
            bias = torch.randn(rows, generator=rng) * 0.1
            tensors[f"{prefix}.{name}.bias"] = bias.bfloat16()
    if shape.qk_norm:
        for name in ("q_norm", "k_norm"):
            tensors[f"{prefix}.{name}.weight"] = torch.ones(shape.head).bfloat16()
    return tensors


def _mlp(prefix: str, model: LookAlike, rng: torch.Generator) -> Tensors:
    hidden, inner = model.shape.hidden, model.shape.intermediate
    tensors = model.layer(f"{prefix}.down_proj", hidden, inner, rng)
    for name in ("gate_proj", "up_proj"):
        tensors |= model.layer(f"{prefix}.{name}", inner, hidden, rng)
    return tensors


def _named(prefix: str, stored: Tensors) -> Tensors:
    return {f"{prefix}.{suffix}": tensor for suffix, tensor in stored.items()}


def write_pictures(cache: Path) -> None:
    """A grey picture under each name that upstream's tests load at import."""
    folder = cache / "vllm_public_assets"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("cherry_blossom", "stop_sign"):
        Image.new("RGB", (64, 64), "grey").save(folder / f"{name}.jpg")
