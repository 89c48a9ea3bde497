# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose layers are held differently, written by the compressed-tensors library or in
AWQ's way, and what their weights stand for."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from awq_words import ORDER, awq_words
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools import make_model

RECIPE = 2
PER_TOKEN = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}
_LEAVES = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape")


@dataclass(frozen=True, eq=False)
class Kind:
    """How a layer is held: compressed-tensors' arguments of weights and activations (None: kept),
    and the format."""

    weights: Mapping[str, Any]
    activations: Mapping[str, Any] | None = None

    @property
    def format(self) -> str:
        if self.weights["type"] == "float":
            return "float-quantized"
        return "int-quantized" if self.activations else "pack-quantized"

    def scheme(self, targets: Sequence[str]) -> QuantizationScheme:
        """compressed-tensors' object for it."""
        return QuantizationScheme(
            targets=list(targets),
            weights=self.weights,
            input_activations=self.activations,
            format=self.format,
        )


def _int(bits: int, group: int, symmetric: bool = True) -> Kind:
    return Kind(
        {
            "num_bits": bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "group",
            "group_size": group,
        }
    )


_CHANNEL = {"num_bits": 8, "symmetric": True, "strategy": "channel"}
W4_G32, W8_G64, W4_G64_ASYMMETRIC = _int(4, 32), _int(8, 64), _int(4, 64, False)
W8A8 = Kind(_CHANNEL | {"type": "int"}, PER_TOKEN | {"type": "int"})
FP8 = Kind(_CHANNEL | {"type": "float"}, PER_TOKEN | {"type": "float"})
FP8_KEPT = Kind(_CHANNEL | {"type": "float"})


@dataclass(frozen=True)
class Mixture:
    """A compressed-tensors configuration: patterns of modules -> how they are held, and patterns of
    those that stay; whatever neither names stays unmentioned (embeddings, norms)."""

    name: str
    rules: tuple[tuple[str, Kind], ...]
    ignore: tuple[str, ...]

    def kind(self, module: str) -> Kind | None:
        """How the module is held, None for 16 bits."""
        if any(_matches(module, pattern) for pattern in self.ignore):
            return None
        return next((kind for pattern, kind in self.rules if _matches(module, pattern)), None)

    def config(self) -> dict[str, Any]:
        """The checkpoint's quantization configuration."""
        groups = {}
        for number, (pattern, kind) in enumerate(self.rules):
            groups[f"group_{number}"] = kind.scheme([pattern]).model_dump(mode="json")
        return {
            "quant_method": "compressed-tensors",
            "format": "mixed-precision",
            "quantization_status": "compressed",
            "ignore": list(self.ignore),
            "config_groups": groups,
        }

    def write(self, plain: Path) -> Path:
        """`plain` in this mixture, beside it; made once."""
        target = plain.with_name(f"{plain.name}-{self.name}")
        quantization = self.config()
        recipe = json.loads(json.dumps({"recipe": RECIPE, "quantization": quantization}))
        if make_model.is_made(target, recipe):
            return target
        state: dict[str, Tensor] = {}
        for name, tensor in load_file(plain / make_model.WEIGHTS).items():
            module, _, leaf = name.rpartition(".")
            kind = self.kind(module) if leaf == "weight" else None
            if kind is None:
                state[name] = tensor
            else:
                made = _compressed(kind, tensor)
                state |= {f"{module}.{part}": value for part, value in made.items()}
        return _save(plain, target, state, quantization, recipe)

    def dequantized(
        self, checkpoint: Path, factors: Mapping[Kind, float] | None = None
    ) -> dict[str, Tensor]:
        """The checkpoint's tensors in float32 as the library reads them, those of a kind times its
        factor. Exact but for FP8's and int8's float32 scales, whose products round at 2**-24."""
        tensors = load_file(checkpoint / make_model.WEIGHTS)
        plain, modules = {}, {}
        for name, tensor in tensors.items():
            module, _, leaf = name.rpartition(".")
            if leaf in _LEAVES and f"{module}.weight_scale" in tensors:
                modules.setdefault(module, {})[leaf] = tensor
            else:
                plain[name] = tensor.float()
        for module, parts in modules.items():
            kind = self.kind(module)
            assert kind is not None, module
            # In float32: the library gives weights in the scale's dtype.
            parts["weight_scale"] = parts["weight_scale"].float()
            compressor = BaseCompressor.get_value_from_registry(kind.format)
            weight = compressor.decompress(parts, kind.scheme(["Linear"]))["weight"].float()
            plain[f"{module}.weight"] = weight * (factors or {}).get(kind, 1.0)
        return plain


def _matches(module: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    return module == pattern


def _compressed(kind: Kind, weight: Tensor) -> dict[str, Tensor]:
    """The library's tensors of one matrix, ranges from its smallest and largest weights. Scales of
    packed weights are stored in the model's dtype, and codes follow what is stored."""
    scheme = kind.scheme(["Linear"])
    n, k = weight.shape
    args = scheme.weights
    assert args is not None
    size = args.group_size if args.strategy == "group" else k
    groups = weight.float().view(n, k // size, size)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    if kind.format == "pack-quantized":
        scale = scale.to(weight.dtype).float()
    compressor = BaseCompressor.get_value_from_registry(kind.format)
    given = {"weight": weight.float(), "weight_scale": scale, "weight_zero_point": zero}
    made = compressor.compress(given, scheme)
    if kind.format == "pack-quantized":
        made["weight_scale"] = scale.to(weight.dtype)
    return {part: tensor.contiguous() for part, tensor in made.items()}


@dataclass(frozen=True)
class Awq:
    """An AWQ checkpoint of 4-bit groups with zero points: patterns of what is quantized, and
    `kept`, what its configuration names as not converted."""

    name: str
    quantized: str
    kept: tuple[str, ...]
    group: int = 32

    def write(self, plain: Path) -> Path:
        """As Mixture.write."""
        target = plain.with_name(f"{plain.name}-{self.name}")
        quantization = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.group,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(self.kept),
        }
        recipe = {"recipe": RECIPE, "quantization": quantization, "quantized": self.quantized}
        if make_model.is_made(target, recipe):
            return target
        state: dict[str, Tensor] = {}
        for name, tensor in load_file(plain / make_model.WEIGHTS).items():
            module, _, leaf = name.rpartition(".")
            if leaf != "weight" or not re.search(self.quantized, module):
                state[name] = tensor
                continue
            made = self._tensors(tensor.float())
            state |= {f"{module}.{part}": value for part, value in made.items()}
        return _save(plain, target, state, quantization, recipe)

    def _tensors(self, weight: Tensor) -> dict[str, Tensor]:
        n, k = weight.shape
        groups = weight.view(n, k // self.group, self.group)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((high - low) / 15).bfloat16().float()
        zero = (-low / scale).round().clamp(0, 15)
        codes = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 15)
        return {
            "qweight": awq_words(codes.view(n, k).int().t().contiguous()),
            "scales": scale.bfloat16().t().contiguous(),
            "qzeros": awq_words(zero.int().t().contiguous()),
        }

    def dequantized(self, checkpoint: Path, factor: float = 1.0) -> dict[str, Tensor]:
        """The checkpoint's tensors in float32: (code - zero point) times scale, which is exact, the
        scale times `factor`."""
        tensors = load_file(checkpoint / make_model.WEIGHTS)
        plain = {}
        for name, tensor in tensors.items():
            module, _, leaf = name.rpartition(".")
            if leaf == "qweight":
                wide = (
                    t.repeat_interleave(self.group, 0)
                    for t in (_awq_codes(tensors[f"{module}.qzeros"]), tensors[f"{module}.scales"])
                )
                zero, scale = wide
                weight = (_awq_codes(tensor) - zero).double() * scale.double() * factor
                plain[f"{module}.weight"] = weight.t().contiguous().float()
            elif leaf not in ("qzeros", "scales"):
                plain[name] = tensor.float()
        return plain


def _awq_codes(words: Tensor) -> Tensor:
    """Unsigned codes [rows, 8 * columns] of AWQ's words."""
    nibbles = (words[..., None] >> torch.arange(0, 32, 4)) & 15
    return nibbles[..., torch.tensor(ORDER).argsort()].flatten(-2)


def _save(
    plain: Path, target: Path, state: dict[str, Tensor], quantization: Any, recipe: Any
) -> Path:
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = quantization
    target.mkdir(parents=True, exist_ok=True)
    (target / make_model.STAMP).unlink(missing_ok=True)
    (target / "config.json").write_text(json.dumps(config))
    save_file(state, target / make_model.WEIGHTS, metadata={"format": "pt"})
    (target / make_model.STAMP).write_text(json.dumps(recipe))
    return target
