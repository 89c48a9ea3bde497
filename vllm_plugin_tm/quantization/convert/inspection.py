# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds: each module's scheme, shape, bytes and kernel, and, where it is of
compressed-tensors, how far its weights are from those of the checkpoint it was made of."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_plugin_tm.quantization.convert.checkpoint import (
    Checkpoint,
    Matrix,
    open_checkpoint,
    read_checkpoint,
)
from vllm_plugin_tm.quantization.convert.errors import ConvertError
from vllm_plugin_tm.quantization.convert.held import (
    METHODS,
    STACKED,
    Held,
    of_compressed_tensors,
    of_method,
    of_stacked_experts,
)
from vllm_plugin_tm.quantization.convert.safetensors_file import Reader, Stored
from vllm_plugin_tm.quantization.support_matrix import (
    Machine,
    MoeRequest,
    Request,
    check,
    check_moe,
)

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

_EXPERT = re.compile(r"\.experts\.\d+\.")
_CODES = ("weight_packed", "weight", "qweight")
_SCALES = ("weight_scale", "weight_scale_inv", "scales")
_MORE = ("weight_zero_point", "weight_global_scale", "weight_scale_2", "qzeros", "g_idx")


@dataclass(frozen=True)
class Error:
    """Of dequantized weights against the originals: `relative` in norm, `largest` of one weight."""

    relative: float
    largest: float


@dataclass(frozen=True)
class Inspected:
    """A module with a matrix. `scheme` is what it is held as, "bf16" and the like where it is not
    quantized; `shape` [N, K]; `kernel` what would run it here: "TM w4a16", or "upstream" with the
    reason in `why`."""

    module: str
    scheme: str
    shape: tuple[int, int]
    nbytes: int
    kernel: str
    why: str = ""
    error: Error | None = None


def inspect(folder: Path, machine: Machine, source: Path | None = None) -> Iterator[Inspected]:
    """Every module of a checkpoint that has a matrix, in the order of its files.

    Compared with `source`, the checkpoint it was made of, where that is given. Raises ConvertError
    as opening a checkpoint does, for a quantization method that is not known, for a module whose
    tensors and configuration disagree, and for `source` beside anything but compressed-tensors.
    """
    checkpoint = read_checkpoint(folder)
    quantization = checkpoint.config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    if quantization and method not in METHODS:
        raise ConvertError(f"{folder}: quant_method is {method!r}; read are {', '.join(METHODS)}")
    if source is not None and method not in (None, METHODS[0]):
        raise ConvertError(
            f"{folder}: weights of quant_method {method!r} are not compared, those of "
            f"{METHODS[0]} are"
        )
    schemes = _schemes(quantization) if method == METHODS[0] else {}
    originals = _originals(source)
    with Reader() as reader:
        reader.open(checkpoint.files)
        if originals is not None:
            reader.open(originals[0].files)
        for module, parts in _modules(checkpoint).items():
            if not any(scale in parts for scale in _SCALES):
                yield _plain(module, parts)
                continue
            error = None
            if method == METHODS[0]:
                scheme = _scheme(module, schemes)
                held = of_compressed_tensors(parts, scheme)
                if originals is not None:
                    error = _error(module, parts, scheme, reader, *originals)
            else:
                held = of_method(module, parts, quantization)
            kernel, why = _kernel(module, held, machine)
            nbytes = sum(stored.spec.nbytes for stored in parts.values())
            yield Inspected(module, held.name, held.shape, nbytes, kernel, why, error)
    if method == STACKED:
        yield from _stacked_experts(checkpoint, machine)


def _stacked_experts(checkpoint: Checkpoint, machine: Machine) -> Iterator[Inspected]:
    """Experts that share a tensor, one by one."""
    for name, blocks in checkpoint.tensors.items():
        module = name.removesuffix("_blocks")
        scales = checkpoint.tensors.get(f"{module}_scales")
        if module == name or scales is None:
            continue
        held = of_stacked_experts(module, blocks, scales)
        experts = blocks.spec.shape[0]
        parent, _, leaf = module.rpartition(".")
        nbytes = (blocks.spec.nbytes + scales.spec.nbytes) // experts
        for expert in range(experts):
            one = f"{parent}.{expert}.{leaf}"
            kernel, why = _kernel(one, held, machine)
            yield Inspected(one, held.name, held.shape, nbytes, kernel, why)


def _modules(checkpoint: Checkpoint) -> dict[str, dict[str, Stored]]:
    """Module -> its tensors, of modules with a matrix."""
    modules: dict[str, dict[str, Stored]] = {}
    for name, stored in checkpoint.tensors.items():
        module, _, part = name.rpartition(".")
        # Norms and convolutions have weights, too.
        matrix = part in _CODES and len(stored.spec.shape) == 2
        if matrix or part in (*_SCALES, *_MORE, "weight_shape"):
            modules.setdefault(module, {})[part] = stored
    return {m: parts for m, parts in modules.items() if any(code in parts for code in _CODES)}


def _schemes(quantization: dict) -> dict[str, "QuantizationScheme"]:
    """Target -> scheme, as the configuration has them."""
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(quantization)
    schemes: dict[str, QuantizationScheme] = {}
    for scheme in config.config_groups.values():
        if scheme.format is None:
            scheme.format = config.format
        schemes |= dict.fromkeys(scheme.targets, scheme)
    return schemes


def _scheme(module: str, schemes: dict[str, "QuantizationScheme"]) -> "QuantizationScheme":
    from compressed_tensors.utils.match import match_name

    for target, scheme in schemes.items():
        if match_name(module, target):
            return scheme
    if "Linear" in schemes:
        return schemes["Linear"]
    raise ConvertError(f"{module} is quantized, but no target of the configuration is it")


def _plain(module: str, parts: dict[str, Stored]) -> Inspected:
    spec = parts["weight"].spec
    name = str(spec.dtype).removeprefix("torch.")
    return Inspected(module, name, (spec.shape[0], spec.shape[1]), spec.nbytes, "upstream")


def _kernel(module: str, held: Held, machine: Machine) -> tuple[str, str]:
    """What would run an unsharded bfloat16 layer with these weights on this machine, and why.
    Experts are asked about one projection at a time, with the usual activation between them."""
    from vllm_plugin_tm import envs

    expert = _EXPERT.search(module) is not None
    why = held.why or (held.expert_why if expert else "")
    if held.ours is None or why:
        return "upstream", why
    n, k = held.shape
    common = (held.weight_type, held.zero_points, held.group, "bfloat16")
    if expert:
        down = module.endswith((".down_proj", ".w2"))
        hidden, inner = (n, k) if down else (k, n // 2 if module.endswith("gate_up_proj") else n)
        experts = MoeRequest(held.ours, *common, hidden, inner, inner, held.activation)
        verdict = check_moe(experts, machine, envs.schemes())
    else:
        verdict = check(Request(*common, k, n, full_k=k), machine, envs.schemes(), held.ours)
    return (f"TM {held.ours}", "") if verdict.ok else ("upstream", verdict.reason or "")


def _originals(source: Path | None) -> tuple[Checkpoint, dict[str, Matrix]] | None:
    if source is None:
        return None
    original = open_checkpoint(source)
    return original, {matrix.module: matrix for matrix in original.matrices()}


def _error(
    module: str,
    parts: dict[str, Stored],
    scheme: "QuantizationScheme",
    reader: Reader,
    original: Checkpoint,
    matrices: dict[str, Matrix],
) -> Error:
    """Dequantized by the library against the original."""
    from compressed_tensors.compressors.base import BaseCompressor

    matrix = matrices.get(module)
    if matrix is None:
        raise ConvertError(f"{module} is quantized, but {original.folder} has no such matrix")
    tensors = {part: reader.read(stored, 0, stored.spec.shape) for part, stored in parts.items()}
    compressor = BaseCompressor.get_value_from_registry(str(scheme.format))
    held: Tensor = compressor.decompress(tensors, scheme)["weight"].double()
    true = matrix.read(reader, 0, matrix.rows, original.block).double()
    if held.shape != true.shape:
        raise ConvertError(
            f"{module}: shape {tuple(held.shape)}, but {tuple(true.shape)} in {original.folder}"
        )
    difference = held - true
    norm = float(torch.linalg.vector_norm(true))
    relative = float(torch.linalg.vector_norm(difference)) / norm if norm else math.nan
    return Error(relative, float(difference.abs().max()))
