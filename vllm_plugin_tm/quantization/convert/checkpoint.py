# SPDX-License-Identifier: Apache-2.0
"""A checkpoint in the Hugging Face layout as the converter reads it: its tensors, its matrices.

No model class is asked: names and shapes say what a tensor is. FP8 checkpoints in blocks
(DeepSeek's layout) are dequantized as they are read; other quantized ones are refused.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vllm_plugin_tm.quantization.convert.errors import ConvertError
from vllm_plugin_tm.quantization.convert.options import BLOCK
from vllm_plugin_tm.quantization.convert.rounding import FP8, dequantize_fp8_block
from vllm_plugin_tm.quantization.convert.safetensors_file import Reader, Stored, read_header

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
BLOCK_SCALE = "_scale_inv"
"""What an FP8 weight's name gets for its blocks' scales."""

_WEIGHT = ".weight"
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# Name of a fused tensor of experts -> the projections in it, in the order of their rows.
_FUSED_EXPERTS = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
# Models whose gate and up rows alternate; to split them needs more than a cut.
_ALTERNATING = ("gpt_oss",)
# Models whose weights are [input, output], as transformers' Conv1D holds them.
_INPUT_FIRST = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


@dataclass(frozen=True)
class Matrix:
    """Weights [rows, columns] of a linear module, output size first.

    They are rows `first` on of `stored` seen as a matrix of that many columns; where `transposed`,
    columns `first` on of its `slab`-th matrix [columns, width]. `block_scale` are the scales of an
    FP8 weight. `problem` says why it cannot be read so, and must stay as it is.
    """

    module: str
    stored: Stored
    rows: int
    columns: int
    first: int = 0
    transposed: bool = False
    slab: int = 0
    block_scale: Stored | None = None
    problem: str | None = None

    def read(self, reader: Reader, begin: int, end: int, block: int | None = None) -> Tensor:
        """Rows `begin` to `end`, in the stored dtype, or float32 of an FP8 weight, whose `begin`
        is a multiple of `block`."""
        if self.transposed:
            width = self.stored.spec.shape[-1]
            start = self.slab * self.columns * width
            whole = reader.read(self.stored, start, (self.columns, width))
            return whole[:, self.first + begin : self.first + end].t().contiguous()
        start = (self.first + begin) * self.columns
        values = reader.read(self.stored, start, (end - begin, self.columns))
        if self.block_scale is None:
            return values
        assert block is not None
        wide = -(-self.columns // block)
        lines = (begin // block, -(-end // block))
        scale = reader.read(self.block_scale, lines[0] * wide, (lines[1] - lines[0], wide))
        return dequantize_fp8_block(values, scale, block)

    @property
    def dtype(self) -> torch.dtype:
        """The type its values have in an unquantized checkpoint."""
        return torch.bfloat16 if self.block_scale is not None else self.stored.spec.dtype


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder: `tensors` by name in the order of files and bytes, `block` the size of its
    FP8 blocks or None."""

    folder: Path
    config: dict
    tensors: dict[str, Stored]
    block: int | None = None

    @property
    def files(self) -> list[Path]:
        """The safetensors files, in order."""
        return list(dict.fromkeys(stored.file for stored in self.tensors.values()))

    @property
    def layers(self) -> int | None:
        """The number of decoder layers, if the configuration has it."""
        value = self.text_config.get("num_hidden_layers")
        return value if isinstance(value, int) else None

    @property
    def text_config(self) -> dict:
        """The configuration of the language model within the whole one's."""
        return self.config.get("text_config") or self.config

    def matrices(self) -> Iterator[Matrix]:
        """Every module with a matrix of floating weights; fused experts one by one."""
        for name, stored in self.tensors.items():
            shape = stored.spec.shape
            module, is_weight, rest = name.rpartition(_WEIGHT)
            if is_weight and not rest and len(shape) == 2 and self._is_weight(stored):
                scale = self.tensors.get(name + BLOCK_SCALE)
                yield Matrix(module, stored, shape[0], shape[1], block_scale=scale)
            elif len(shape) == 3 and name.split(".")[-2:-1] == ["experts"]:
                yield from self._experts(name, stored)

    def _is_weight(self, stored: Stored) -> bool:
        if stored.spec.dtype == FP8:
            return stored.spec.name + BLOCK_SCALE in self.tensors
        return stored.spec.dtype in _FLOATS

    def _experts(self, name: str, stored: Stored) -> Iterator[Matrix]:
        """The matrices in a tensor of all experts: [E, rows, columns] or [E, columns, rows]."""
        parent, _, leaf = name.rpartition(".")
        parts = _FUSED_EXPERTS.get(leaf)
        if parts is None or stored.spec.dtype not in _FLOATS:
            return
        experts, first, second = stored.spec.shape
        problem, transposed = None, self._is_transposed(name)
        kind = str(self.text_config.get("model_type", self.config.get("model_type", "")))
        if kind.startswith(_ALTERNATING):
            problem = f"gates and ups alternate in {kind} models, vLLM loads them otherwise"
        elif transposed is None:
            problem = (
                f"shape {[experts, first, second]} does not say which side is the hidden size "
                f"({self.text_config.get('hidden_size')})"
            )
        rows, columns = (second, first) if transposed else (first, second)
        for expert in range(experts):
            for index, part in enumerate(parts):
                own = rows // len(parts)
                yield Matrix(
                    f"{parent}.{expert}.{part}",
                    stored,
                    own,
                    columns,
                    first=index * own + (0 if transposed else expert * rows),
                    transposed=bool(transposed),
                    slab=expert,
                    problem=problem,
                )

    def _is_transposed(self, name: str) -> bool | None:
        """Whether a tensor of experts is [E, columns, rows], by the model's hidden size; where both
        sides of one have that size its neighbour tells. None where neither does."""
        hidden = self.text_config.get("hidden_size")
        parent = name.rpartition(".")[0]
        for other in (name, *(f"{parent}.{leaf}" for leaf in _FUSED_EXPERTS)):
            if other not in self.tensors:
                continue
            first, second = self.tensors[other].spec.shape[1:]
            # gate_up_proj reads the hidden state: hidden is its columns; down_proj writes it.
            reads = other.endswith("gate_up_proj")
            plain, turned = (second, first) if reads else (first, second)
            if (plain == hidden) != (turned == hidden):
                return turned == hidden
        return None


def open_checkpoint(folder: Path) -> Checkpoint:
    """As read_checkpoint, of one that can be converted.

    Raises ConvertError also for a checkpoint that is quantized otherwise than in FP8 blocks, and
    for models whose weights have the input size first.
    """
    checkpoint = read_checkpoint(folder)
    kind = checkpoint.config.get("model_type")
    if kind in _INPUT_FIRST:
        raise ConvertError(
            f"{folder}: weights of {kind} models have the input size first; compressed-tensors has "
            "no such layers"
        )
    block = _fp8_block(folder, checkpoint.config)
    if block is not None and BLOCK % block:  # pieces are cut at multiples of it
        raise ConvertError(f"{folder}: FP8 blocks of {block}; sizes that divide {BLOCK} are read")
    for name, stored in checkpoint.tensors.items():
        scaled = block is not None and name + BLOCK_SCALE in checkpoint.tensors
        if stored.spec.dtype == FP8 and not scaled:
            raise ConvertError(f"{name} is FP8 without the scales of its blocks, {BLOCK_SCALE}")
    return replace(checkpoint, block=block)


def read_checkpoint(folder: Path) -> Checkpoint:
    """The headers and the configuration of a folder.

    Raises ConvertError naming the file for: no folder, no config.json, no safetensors files, a
    shard that the index names and the folder lacks, a truncated shard, and a tensor that is in two
    files.
    """
    if not folder.is_dir():
        raise ConvertError(f"{folder}: no such folder; SRC is a checkpoint on this machine")
    config = _read_json(folder / CONFIG)
    tensors: dict[str, Stored] = {}
    for path in _files(folder):
        for name, stored in read_header(path).items():
            if name in tensors:
                raise ConvertError(f"{name} is in {tensors[name].file.name} and in {path.name}")
            tensors[name] = stored
    return Checkpoint(folder, config, tensors)


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ConvertError(f"{folder}: {INDEX} names files that are not there: {missing}")
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise ConvertError(f"{folder}: no safetensors files; other formats are not read")
    return [folder / name for name in names]


def _fp8_block(folder: Path, config: dict) -> int | None:
    """The size of the FP8 blocks that the configuration declares; refuses other ones."""
    quantization = config.get("quantization_config")
    if quantization is None:
        quantization = (config.get("text_config") or {}).get("quantization_config")
    if quantization is None:
        return None
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method == "fp8" and isinstance(block, list) and len(set(block)) == 1:
        return int(block[0])
    raise ConvertError(
        f"{folder}: the checkpoint is quantized already (quant_method {method!r}, "
        f"weight_block_size {block}); read are unquantized ones and FP8 in square blocks"
    )


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ConvertError(f"{path.parent}: no {path.name} in it") from None
    except (OSError, ValueError) as error:
        raise ConvertError(f"{path}: cannot be read: {error}") from None
