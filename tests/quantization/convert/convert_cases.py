# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints for the converter's tests, and how its output is read again."""

import json
from pathlib import Path

import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from golden_names import MODELS, lines
from safetensors.torch import load_file, save_file


def make(
    folder: Path, name: str = "llama", dtype: torch.dtype = torch.bfloat16, shards: int = 1
) -> Path:
    """A checkpoint with a golden model's names, seeded weights, a tokenizer and more beside."""
    text, config = MODELS[name]
    generator = torch.Generator().manual_seed(7)
    tensors = {
        tensor: (torch.randn(shape, generator=generator) * 0.05).to(dtype)
        for tensor, shape, _ in lines(text)
    }
    return write(folder, tensors, {**config, "torch_dtype": str(dtype)[6:]}, shards)


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict, shards: int = 1) -> Path:
    """A folder with these tensors, in so many files."""
    folder.mkdir(parents=True)
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        where = {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = {tensor: tensors[tensor] for tensor in names[number::shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling_own.py").write_text("# code of the checkpoint's own\n")
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by the safetensors library."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file's bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def quantization_of(folder: Path) -> QuantizationConfig:
    """The configuration as the compressed-tensors library reads it."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return QuantizationConfig.model_validate(config)


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """Module -> weights of the quantized modules, by the compressed-tensors library."""
    schemes: dict[str, QuantizationScheme] = {}
    for scheme in quantization_of(folder).config_groups.values():
        schemes |= dict.fromkeys(scheme.targets, scheme)
    tensors = tensors_of(folder)
    weights = {}
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part == "weight_scale":
            scheme = schemes.get(module) or schemes["Linear"]
            parts = {
                n.rpartition(".")[2]: t
                for n, t in tensors.items()
                if n.rpartition(".")[0] == module
            }
            parts.pop("bias", None)
            compressor = BaseCompressor.get_value_from_registry(str(scheme.format))
            weights[module] = compressor.decompress(parts, scheme)["weight"]
    return weights
