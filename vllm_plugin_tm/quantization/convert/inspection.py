# SPDX-License-Identifier: Apache-2.0
"""What a compressed-tensors checkpoint holds: each module's scheme, shape, bytes and kernel, and
how far its weights are from those of the checkpoint it was made of."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from vllm_plugin_tm.quantization.convert.options import (
    FLOAT_QUANTIZED,
    INT_QUANTIZED,
    PACK_QUANTIZED,
)
from vllm_plugin_tm.quantization.convert.safetensors_file import Reader, Stored
from vllm_plugin_tm.quantization.small_floats import block_group
from vllm_plugin_tm.quantization.support_matrix import (
    CHANNEL,
    WEIGHT_TYPES,
    Machine,
    MoeRequest,
    Request,
    check,
    check_moe,
)

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

_EXPERT = re.compile(r"\.experts\.\d+\.")
_MATRIX = ("weight_packed", "weight")
_PARTS = (
    *(*_MATRIX, "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale"),
    *("input_scale", "input_zero_point", "input_global_scale"),
)
# Floats by their formats; integers have a type for every width.
_FLOATS = {
    FLOAT_QUANTIZED: "float8_e4m3fn",
    "mxfp4-pack-quantized": "mxfp4",
    "nvfp4-pack-quantized": "nvfp4",
}


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
    as opening a checkpoint does, for a quantization that is not compressed-tensors, and for a
    module whose tensors and configuration disagree.
    """
    checkpoint = read_checkpoint(folder)
    quantization = checkpoint.config.get("quantization_config")
    schemes = _schemes(folder, quantization) if quantization else {}
    originals = _originals(source)
    with Reader() as reader:
        reader.open(checkpoint.files)
        if originals is not None:
            reader.open(originals[0].files)
        for module, parts in _modules(checkpoint).items():
            if "weight_scale" not in parts:
                yield _plain(module, parts)
                continue
            scheme = _scheme(module, schemes)
            found = _quantized(module, parts, scheme, machine)
            if originals is not None:
                error = _error(module, parts, scheme, reader, *originals)
                found = Inspected(**{**vars(found), "error": error})
            yield found


def _modules(checkpoint: Checkpoint) -> dict[str, dict[str, Stored]]:
    """Module -> its tensors, of modules with a matrix."""
    modules: dict[str, dict[str, Stored]] = {}
    for name, stored in checkpoint.tensors.items():
        module, _, part = name.rpartition(".")
        if part in _PARTS:
            modules.setdefault(module, {})[part] = stored
    return {
        module: parts
        for module, parts in modules.items()
        if any(len(parts[name].spec.shape) == 2 for name in _MATRIX if name in parts)
    }


def _schemes(folder: Path, quantization: dict) -> dict[str, "QuantizationScheme"]:
    """Target -> scheme, as the configuration has them."""
    from compressed_tensors.quantization import QuantizationConfig

    method = quantization.get("quant_method")
    if method != "compressed-tensors":
        raise ConvertError(
            f"{folder}: quant_method is {method!r}; compressed-tensors checkpoints are read"
        )
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


def _quantized(
    module: str, parts: dict[str, Stored], scheme: "QuantizationScheme", machine: Machine
) -> Inspected:
    weights = scheme.weights
    codes = parts.get("weight_packed", parts.get("weight"))
    assert codes is not None
    assert weights is not None
    n, k = codes.spec.shape
    grouped = (weights.group_size or 0) > 0
    if "weight_packed" in parts:
        per_word = 32 // weights.num_bits
        k = parts["weight_scale"].spec.shape[1] * weights.group_size if grouped else k * per_word
    group = f"g{weights.group_size}" if grouped else _text(weights.strategy)
    name = f"{_name(scheme)} {group}" + ("" if weights.symmetric else " asymmetric")
    kernel, why = _kernel(module, n, k, scheme, machine)
    nbytes = sum(stored.spec.nbytes for stored in parts.values())
    return Inspected(module, name, (n, k), nbytes, kernel, why)


def _name(scheme: "QuantizationScheme") -> str:
    """As "w4a16", "fp8" (activations too), "fp8a16", "nvfp4"."""
    weights, act = scheme.weights, scheme.input_activations
    assert weights is not None
    if _text(weights.type) != "float":
        return f"w{weights.num_bits}a{act.num_bits if act else 16}"
    floats = _FLOATS.get(str(scheme.format), "")
    if floats.endswith("fp4"):
        return floats
    return f"fp{weights.num_bits}" + ("" if act else "a16")


def _text(value: object) -> str:
    """An enumeration's value, or the text it was given as."""
    return str(getattr(value, "value", value))


def _weight_type(scheme: "QuantizationScheme") -> str | None:
    """The support matrix's name for the weights."""
    weights = scheme.weights
    assert weights is not None
    bits, kind = weights.num_bits, str(scheme.format)
    if _text(weights.type) == "float":
        return None if (kind == FLOAT_QUANTIZED and bits != 8) else _FLOATS.get(kind)
    types = {
        (PACK_QUANTIZED, True): f"uint{bits}b{1 << (bits - 1)}",
        (PACK_QUANTIZED, False): f"uint{bits}",
        (INT_QUANTIZED, True): f"int{bits}",
    }
    return types.get((kind, bool(weights.symmetric)))


def _kernel(
    module: str, n: int, k: int, scheme: "QuantizationScheme", machine: Machine
) -> tuple[str, str]:
    """What would run an unsharded bfloat16 layer with these weights on this machine, and why.
    Experts are asked about one projection at a time, with the usual activation between them."""
    from vllm_plugin_tm import envs

    weights, act = scheme.weights, scheme.input_activations
    assert weights is not None
    bits = weights.num_bits
    weight_type = _weight_type(scheme)
    if weight_type is None:
        return "upstream", f"{scheme.format} of {bits} bits has no TM kernel"
    our = f"w{4 if bits <= 4 else 8}a{8 if act else 16}"
    if WEIGHT_TYPES[weight_type].floats:
        our = f"fp{bits}"
    group = weights.group_size if (weights.group_size or 0) > 0 else CHANNEL
    if weights.block_structure:
        group = block_group(k, int(weights.block_structure[1]))
    common = (weight_type, not weights.symmetric, int(group or CHANNEL), "bfloat16")
    if _EXPERT.search(module):
        if our == "fp8" and not act:
            return "upstream", "FP8 experts run with FP8 activations only"
        down = module.endswith((".down_proj", ".w2"))
        hidden, inner = (n, k) if down else (k, n)
        experts = MoeRequest(our, *common, hidden, inner, inner, activation="silu")
        verdict = check_moe(experts, machine, envs.schemes())
    else:
        if our == "fp8" and not act:
            machine = replace(machine, amx=False)  # upstream has no kernel of this kind
        verdict = check(Request(*common, k, n, full_k=k), machine, envs.schemes(), our)
    return (f"TM {our}", "") if verdict.ok else ("upstream", verdict.reason or "")


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
