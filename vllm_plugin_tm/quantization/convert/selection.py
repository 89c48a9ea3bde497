# SPDX-License-Identifier: Apache-2.0
"""Which modules of a checkpoint are quantized, by name, and why the others are not.

Needs no model class: the names of published checkpoints say what a matrix is. What is not known to
be a projection of attention, an MLP or experts is left alone.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from vllm_plugin_tm.quantization.convert.errors import ConvertError
from vllm_plugin_tm.quantization.convert.options import Options

_SHOWN = 4

# Components of a name, whole: "gate" is a router, "gate_proj" is not. The first rule that matches
# gives the reason. Lower-case names; checkpoints differ in case here and there.
_KEPT: tuple[tuple[str, str], ...] = (
    (
        r"(visual|vision|vision_\w+|vit|image_\w+|patch_\w+|multi_modal_projector|mm_\w+|audio|"
        r"audio_\w+|speech_\w+|embed_vision|embed_audio|aligner|img_\w+)",
        "vision or audio tower",
    ),
    (r"mtp(_\w+)?|nextn\w*|eh_proj", "multi-token prediction head"),
    (
        r"(embed_\w+|\w*embeddings?|embed|wte|wpe|tok_\w+|rotary_emb|per_layer_model_projection)",
        "embedding",
    ),
    (r"(lm_head|output|embed_out|score|classifier|shared_head)", "output head"),
    (r"(gate|router|\w+_gate|wg|gating)", "router or gate"),
    (r"(\w*norm\w*|ln_?\w+)", "norm"),
    (r"(conv\w*|\w+_conv)", "convolution"),
    (
        r"(in_proj_(a|b|ba)|a_proj|b_proj|x_proj|dt_proj|f_[ab]_proj|g_[ab]_proj)",
        "linear-attention state",
    ),
    (r"indexer", "indexer of sparse attention"),
)
_MTP = "multi-token prediction head"
_HEAD = "output head"
_NO_RULE = "not a projection of attention, an MLP or experts"

# What holds the projections, and the projections' own names where a block has no such part.
_BLOCK = re.compile(
    r"(self_attn|self_attention|attn|attention|cross_attn|linear_attn|mixer|mlp|mlp_\w+|"
    r"feed_forward|ffn|block_sparse_moe|moe|experts|shared_experts?|shared_mlp|residual_mlp|"
    r"w[123]|[qkvo]_proj|qkv_proj|gate_proj|up_proj|down_proj|gate_up_proj)"
)
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|decoder_layers)\.(\d+)\.")

# Modules that vLLM runs as one: they are quantized alike or not at all.
FUSED: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
)
_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.(\w+)$")


@dataclass(frozen=True)
class Choice:
    """Of modules with a matrix: `quantized` in the order given, `kept` with the reason of each."""

    quantized: tuple[str, ...]
    kept: dict[str, str]


def select(
    modules: Iterable[str], options: Options, layers: int | None = None, *, lenient: bool = False
) -> Choice:
    """Chooses among the names of modules that have a matrix of weights.

    `layers` is the number of decoder layers in the model's configuration: a layer beyond it is a
    multi-token prediction head. Raises ConvertError for a pattern of `options` that matches none
    (unless `lenient`: these are not all modules), and where modules that vLLM runs as one would be
    quantized in part: both are named.
    """
    names = list(modules)
    for option, patterns in (("targets", options.targets or ()), ("ignore", options.ignore)):
        for pattern in () if lenient else patterns:
            if not any(matches(name, pattern) for name in names):
                raise ConvertError(
                    f"{option} pattern {pattern!r} matches no module with a matrix of weights; "
                    f"there are {_some(names)}"
                )
    reasons = {name: _reason(name, options, layers) for name in names}
    kept = {name: reason for name, reason in reasons.items() if reason is not None}
    quantized = tuple(name for name in names if name not in kept)
    if not lenient:
        _check_fused(quantized, kept)
    return Choice(quantized, kept)


def matches(name: str, pattern: str) -> bool:
    """Whether a module's name matches a pattern as compressed-tensors reads it."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return name == pattern


def layer_of(name: str) -> str:
    """The layer that a module is part of in vLLM: its own name, unless several run as one. All
    experts of a decoder layer do, with all their projections."""
    expert = _EXPERT.match(name)
    if expert:
        return expert[1]
    parent, _, leaf = name.rpartition(".")
    fused = next((group for group in FUSED if leaf in group), (leaf,))
    return f"{parent}.{fused[0]}"


def is_head(name: str) -> bool:
    """Whether this is the matrix of output logits."""
    return name.rpartition(".")[2] in ("lm_head", "embed_out")


def is_embedding(name: str) -> bool:
    """Whether the rule of embeddings is the one that keeps this module."""
    return _rule(name) == "embedding"


def _reason(name: str, options: Options, layers: int | None) -> str | None:
    """Why the module stays as it is; None for one that is quantized."""
    if any(matches(name, pattern) for pattern in options.ignore):
        return "ignored, as asked"
    if options.targets is not None:
        wanted = any(matches(name, pattern) for pattern in options.targets)
        return None if wanted else "not among the targets, as asked"
    rule = _rule(name)
    index = _LAYER.search(name)
    if layers is not None and index and int(index[1]) >= layers and rule is None:
        rule = _MTP
    if rule == _HEAD and options.lm_head and is_head(name):
        return None
    if rule == _MTP and options.mtp:
        inner = [reason for reason in _rules(name) if reason != _MTP]
        rule = inner[0] if inner else None
    if rule is not None:
        return rule
    in_block = index is not None and any(
        _BLOCK.fullmatch(part) for part in name[index.end() :].split(".")
    )
    return None if in_block else _NO_RULE


def _rule(name: str) -> str | None:
    return next(iter(_rules(name)), None)


def _rules(name: str) -> list[str]:
    parts = name.lower().split(".")
    return [
        reason for pattern, reason in _KEPT if any(re.fullmatch(pattern, part) for part in parts)
    ]


def _check_fused(quantized: tuple[str, ...], kept: dict[str, str]) -> None:
    first = {layer_of(name): name for name in reversed(quantized)}
    for name in kept:
        other = first.get(layer_of(name))
        if other is not None:
            _refuse(other, name, kept)


def _refuse(quantized: str, other: str, kept: dict[str, str]) -> None:
    raise ConvertError(
        f"{quantized} would be quantized and {other} would not ({kept[other]}), but vLLM runs them "
        "as one layer; quantize both or neither"
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more if names else "none"
