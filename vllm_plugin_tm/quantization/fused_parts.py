# SPDX-License-Identifier: Apache-2.0
"""Refusing checkpoints that hold the parts of one layer differently, by the parts' names.

vLLM runs several of a checkpoint's modules as one layer (q, k and v; gates and ups). Upstream takes
the first part's scheme for all where a configuration gives them different ones, and says of a part
in 16 bits only that there is one.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from vllm_plugin_tm.quantization.activations import text
from vllm_plugin_tm.quantization.load_check import CheckpointError

_CODES = ("weight", "weight_packed", "qweight")
_SCALES = ("weight_scale", "weight_scale_inv")
_PLAIN = ("BF16", "F16", "F32")  # safetensors' names
_TAIL = 4  # components that name a layer whatever a model's outer modules are called


def refuse_schemes(model: torch.nn.Module, config: Any) -> None:
    """Raises CheckpointError where compressed-tensors' configuration gives the parts of a layer
    different weights, activations or formats."""
    ask = getattr(config, "get_scheme_dict", None)
    if ask is None:
        return
    for name, module, parts in _fused(model):
        _refuse_different(name, {part: _scheme(ask(module, part)) for part in parts})


def refuse_tensors(model: torch.nn.Module, dtypes: Mapping[str, str]) -> None:
    """Raises CheckpointError where the checkpoint has codes for a part of a layer and plain weights
    for another. `dtypes` are those of its tensors, as safetensors calls them."""
    held: dict[str, str] = {}
    by_tail: dict[str, list[str]] = {}
    for tensor, dtype in dtypes.items():
        module, _, leaf = tensor.rpartition(".")
        if leaf in _CODES:
            scaled = any(f"{module}.{scale}" in dtypes for scale in _SCALES)
            plain = leaf == "weight" and dtype in _PLAIN and not scaled
            held[module] = "plain weights" if plain else f"codes ({leaf})"
            by_tail.setdefault(_tail(module), []).append(module)
    for name, _, parts in _fused(model):
        # By their own names, or by those that can only be theirs: a tower has layers too.
        found = [[part] if part in held else by_tail.get(_tail(part), []) for part in parts]
        if all(len(modules) < 2 for modules in found):
            _refuse_different(name, {part: held[part] for modules in found for part in modules})


def disagreement(config: Any, layer: LinearBase) -> str:
    """Which parts of a layer that could not be built are quantized and which are not, as a
    sentence; empty where that is not what is wrong with it."""
    parts = _parts(layer.prefix, getattr(config, "packed_modules_mapping", None) or {})
    plain: dict[bool, str] = {}
    for part in parts:
        try:
            method = config.get_quant_method(layer, part)
        except ValueError:
            return ""
        plain.setdefault(isinstance(method, UnquantizedLinearMethod), part)
    if len(plain) < 2:
        return ""
    return f"{plain[False]} is quantized and {plain[True]} is not, but vLLM runs them as one layer."


def _fused(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, list[str]]]:
    """Name, module and parts' names of the linear layers that are made of several."""
    mapping = getattr(model, "packed_modules_mapping", None) or {}
    for name, module in model.named_modules():
        if isinstance(module, LinearBase) and (parts := _parts(name, mapping)):
            yield name, module, parts


def _parts(layer: str, mapping: Mapping[str, Sequence[str]]) -> list[str]:
    parent, _, leaf = layer.rpartition(".")
    parts = mapping.get(leaf, ())
    return [f"{parent}.{part}" for part in parts] if len(parts) > 1 else []


def _tail(name: str) -> str:
    return ".".join(name.split(".")[-_TAIL:])


def _scheme(found: Mapping[str, Any] | None) -> str:
    """What a layer's numbers depend on, in words."""
    if found is None:
        return "16 bits"
    args = [_args(found.get(which)) for which in ("weights", "input_activations")]
    return f"weights {args[0]}, activations {args[1]} ({text(found.get('format'))})"


def _args(args: Any) -> str:
    if args is None:
        return "kept"
    size = args.group_size if (args.group_size or 0) > 0 else args.block_structure or ""
    zero = "" if args.symmetric else " with zero points"
    when = {True: " dynamic", False: ""}.get(args.dynamic, f" {text(args.dynamic)}")
    kind = f"{text(args.type)}{args.num_bits} per {text(args.strategy)}"
    return f"{kind} {size}".strip() + zero + when


def _refuse_different(layer: str, parts: Mapping[str, str]) -> None:
    first: tuple[str, str] | None = None
    for part, how in parts.items():
        first = first or (part, how)
        if how != first[1]:
            raise CheckpointError(
                f"{first[0]} is held as {first[1]}, and {part} as {how}, but vLLM runs them as one "
                f"layer, {layer}, which must be held in one way"
            )
