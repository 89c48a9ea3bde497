# SPDX-License-Identifier: Apache-2.0
"""Seeing what a checkpoint did not fill: marks in the parameters before loading, looked for after.

Upstream allocates quantized parameters without writing them and does not track their loading, so
a missing tensor would be served as whatever the memory held.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.parameter import BasevLLMParameter

from vllm_plugin_tm.kernels import ops

# Words that no real tensor holds throughout a row. That of packed codes has far-apart codes side by
# side, unlike zero points, which gather around the middle. That of bytes is no 4-bit weight, and
# 8-bit weights that are all alike would lie at the end of their range. The floating ones are NaNs
# with a payload: a NaN of the checkpoint's own is told apart, and none can be mistaken for a scale.
_MARKS: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.int32: (torch.int32, 0x0F1E2D3C),
    torch.int8: (torch.int8, -77),
    torch.bfloat16: (torch.int16, 0x7FE5),
    torch.float16: (torch.int16, 0x7F5A),
    torch.float32: (torch.int32, 0x7FE5A5A5),
    torch.float8_e4m3fn: (torch.int8, 0x7F),  # not a number, all of a row
    torch.uint8: (torch.int8, -0x78),  # e2m1's -0, twice a byte; as a scale 2**9
}
KERNEL_LAYOUT = "tm_kernel_layout"
"""The attribute of parameters that are in kernel layout: no checkpoint's tensors go there."""

_SHOWN = 8  # missing tensors that an error lists
_SHAPE_NUMBERS = 2  # in the checkpoint's weight_shape: outputs and inputs
_EXPERTS_DIM = 3  # dimensions of the parameters of experts


class CheckpointError(ValueError):
    """The checkpoint is damaged or incomplete."""


@dataclass(frozen=True)
class Layer:
    """A layer to watch: its name in the model, its module, the parameters that must be loaded.

    `sources` are the checkpoint's modules that are fused in it, each with its number of output
    rows in this shard; a layer that is fused from nothing has itself as the only one. `prefix` is
    what stands before the checkpoint's names of tensors in the parameters' names. Parameters of
    experts are [experts, rows, ...], or [experts, ..., rows] where `rows_last`. `late_bias`: one is
    made where the checkpoint brings it.
    """

    name: str
    module: torch.nn.Module
    tensors: tuple[str, ...]
    sources: tuple[tuple[str, int], ...]
    prefix: str = ""
    rows_last: bool = False
    late_bias: bool = False


@dataclass(frozen=True)
class Marked:
    """A parameter whose memory was marked; `name` is the parameter's name in its layer."""

    layer: Layer
    name: str
    param: torch.Tensor


def count_shapes(layer: Layer) -> None:
    """Tells upstream's reload, which counts numbers to know when a layer is complete, that each
    part of the layer brings the shape anew. It would take the layer for complete too early."""
    params, _buffers = get_layerwise_info(layer.module).restore_metadata
    shape = params.get(f"{layer.prefix}weight_shape")
    if shape is not None:
        vars(shape)["weight_loader_numel"] = _SHAPE_NUMBERS * len(layer.sources)


def mark(layers: Iterable[Layer]) -> list[Marked]:
    """Marks the memory of the layers' parameters.

    Left alone are parameters without memory (meta device), of other dtypes, and those in kernel
    order, which declare no output_dim and are loaded by other ways. A byte that stands alone has
    no value to spare for a mark: such a parameter is given 32-bit integers to be loaded into.
    """
    marked = []
    for layer in layers:
        for name in layer.tensors:
            param = getattr(layer.module, name, None)
            if param is None or param.is_meta or param.dtype not in _MARKS:
                continue
            if getattr(param, KERNEL_LAYOUT, False):
                continue
            scalars = isinstance(param, BasevLLMParameter) or _one_for_each(param, layer)
            if not _has_rows(param) and not scalars:
                continue
            if param.dtype == torch.int8 and not _has_rows(param):
                param.data = param.data.to(torch.int32)
            ops.advise_huge_pages(param.data)  # the first write maps the pages
            _words(param).fill_(_MARKS[param.dtype][1])
            marked.append(Marked(layer, name, param))
    return marked


def refuse_missing(marked: Iterable[Marked]) -> None:
    """Raises CheckpointError naming the tensors of which some output rows were not loaded."""
    lines = [
        f"{source}.{entry.name.removeprefix(entry.layer.prefix)} (layer {entry.layer.name})"
        for entry in marked
        for source in _missing_sources(entry)
    ]
    if lines:
        raise_missing(lines, "checkpoint")


def raise_missing(lines: list[str], where: str) -> NoReturn:
    """Raises CheckpointError: what the lines say is missing in `where`. Shows the first ones."""
    shown = lines[:_SHOWN] + ([f"and {len(lines) - _SHOWN} more"] if lines[_SHOWN:] else [])
    raise CheckpointError(f"missing in the {where}:\n  " + "\n  ".join(shown))


def refuse_unfit(name: str, tensor: torch.Tensor, layers: Mapping[str, Layer]) -> None:
    """Raises CheckpointError for a checkpoint tensor that upstream would take in silence, wrongly.

    `layers` maps the checkpoint's module names to the layers they go into. Refused are tensors
    that would be cast to another kind of number, and a bias for a layer without one (it would be
    dropped; some exporters write biases of zeros, which are let through).
    """
    source, _, leaf = name.rpartition(".")
    layer = layers.get(source)
    if layer is None:
        return
    param_name = layer.prefix + leaf
    param = getattr(layer.module, param_name, None) if param_name in layer.tensors else None
    if param is not None and not _fits(param, tensor):
        raise CheckpointError(f"{name}: expected {_kind(param)}, found {tensor.dtype}")
    without_bias = not layer.late_bias and getattr(layer.module, param_name, None) is None
    if leaf == "bias" and without_bias and bool(tensor.any()):
        raise CheckpointError(
            f"{name}: surplus in the checkpoint, layer {layer.name} of this model has no bias"
        )


def refuse_damaged(files: Iterable[str]) -> dict[str, str]:
    """Name -> dtype, as safetensors calls it, of the files' tensors.

    Raises CheckpointError naming the first safetensors file that is shorter or longer than its
    header says, or whose header cannot be read. Reads headers only.
    """
    dtypes: dict[str, str] = {}
    for file in files:
        path = Path(file)
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(
                    f"{file}: truncated, its header alone should take {8 + length} bytes, "
                    f"the file has {size}"
                )
            try:
                header = json.loads(stream.read(length))
                header.pop("__metadata__", None)
                ends = [entry["data_offsets"][1] for entry in header.values()]
            except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
                raise CheckpointError(f"{file}: damaged safetensors header: {error!r}") from error
        expected = 8 + length + max(ends, default=0)
        if expected != size:
            kind = "truncated" if size < expected else "damaged"
            raise CheckpointError(
                f"{file}: {kind}, its header describes {expected} bytes, the file has {size}"
            )
        dtypes |= {name: str(entry.get("dtype")) for name, entry in header.items()}
    return dtypes


def _has_rows(param: torch.Tensor) -> bool:
    """Whether the parameter has output rows; else it is one value for each source, or for all."""
    return getattr(param, "output_dim", None) in (0, 1) or param.dim() == _EXPERTS_DIM


def _one_for_each(param: torch.Tensor, layer: Layer) -> bool:
    """Whether a parameter of experts has one value for each of them, or for each of its parts."""
    return param.numel() > 0 and len(layer.sources) % param.numel() == 0


def _fits(param: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Scales come in any floating dtype, single integers in any integer one, codes and bytes of
    scales in their own."""
    if param.dtype.itemsize == 1 and _has_rows(param):
        return param.dtype == tensor.dtype
    if param.is_floating_point() or not _has_rows(param):
        return param.is_floating_point() == tensor.is_floating_point()
    return param.dtype == tensor.dtype


def _kind(param: torch.Tensor) -> str:
    if param.is_floating_point() and param.dtype.itemsize > 1:
        return "a floating dtype"
    return f"dtype {param.dtype}" if _has_rows(param) else "an integer dtype"


def _words(param: torch.Tensor) -> torch.Tensor:
    """The parameter's memory as integers of its width: a mark is bits, not a number."""
    return param.data.view(_MARKS[param.dtype][0])


def _missing_sources(entry: Marked) -> list[str]:
    """The layer's sources of which at least one output row still is the mark throughout."""
    same = _words(entry.param) == _MARKS[entry.param.dtype][1]
    sources = entry.layer.sources
    if not _has_rows(entry.param):
        untouched = same.flatten().tolist()
        if len(untouched) == len(sources):
            return [name for (name, _), missing in zip(sources, untouched, strict=True) if missing]
        # One value for all of a fused layer: each part may bring it.
        return [sources[0][0]] if any(untouched) else []
    if same.dim() == _EXPERTS_DIM:
        return _missing_experts(same.transpose(1, 2) if entry.layer.rows_last else same, sources)
    output_dim: int = entry.param.output_dim  # type: ignore[attr-defined]
    # Scales of channels may be a vector.
    untouched = same.movedim(output_dim, 0).reshape(same.shape[output_dim], -1).all(1).tolist()
    total = sum(rows for _, rows in sources)
    missing = []
    start = 0
    for source, rows in sources:
        stop = start + rows
        # Tensors that are packed along the output have fewer rows, in the same proportion.
        if any(untouched[start * len(untouched) // total : -(-stop * len(untouched) // total)]):
            missing.append(source)
        start = stop
    return missing


def _missing_experts(same: torch.Tensor, sources: tuple[tuple[str, int], ...]) -> list[str]:
    """The sources, in the order of experts and rows, of which a row or a column of `same`
    [experts, rows, columns] is the mark throughout: upstream takes an expert's tensor that is
    smaller than its place."""
    missing = []
    parts = len(sources) // same.shape[0]
    for expert, untouched in enumerate(same):
        mine = sources[expert * parts : (expert + 1) * parts]
        total, start = sum(rows for _, rows in mine), 0
        for source, rows in mine:
            stop = start + rows
            # Packed along the rows there are fewer of them, in the same proportion.
            share = slice(start * len(untouched) // total, -(-stop * len(untouched) // total))
            block = untouched[share]
            if bool(block.all(dim=1).any()) or bool(block.all(dim=0).any()):
                missing.append(source)
            start = stop
    return missing
