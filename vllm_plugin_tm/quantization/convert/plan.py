# SPDX-License-Identifier: Apache-2.0
"""What a conversion will write, to the byte, before the first weight is read.

Shapes say it all: every output tensor has its file and its place, so pieces may be made in any
order by any number of workers and give the same files.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from vllm_plugin_tm.quantization.convert.checkpoint import (
    BLOCK_SCALE,
    Checkpoint,
    Matrix,
)
from vllm_plugin_tm.quantization.convert.errors import ConvertError
from vllm_plugin_tm.quantization.convert.options import (
    INT_QUANTIZED,
    PACK_QUANTIZED,
    Options,
)
from vllm_plugin_tm.quantization.convert.rounding import FP8
from vllm_plugin_tm.quantization.convert.safetensors_file import Spec, Stored
from vllm_plugin_tm.quantization.convert.selection import is_head, layer_of, select
from vllm_plugin_tm.quantization.support_matrix import CHANNEL, WORD_BITS


@dataclass(frozen=True)
class Job:
    """A tensor or matrix on its way: `outputs` are what it becomes.

    With a `matrix`: quantized by groups of `group_size` (CHANNEL: by row; of fp8-block: by square
    block), or, `group_size` None, an FP8 weight that is only dequantized. Without: `stored`
    copied as it is.
    """

    stored: Stored
    outputs: tuple[Spec, ...]
    matrix: Matrix | None = None
    group_size: int | None = None

    @property
    def rows(self) -> int:
        """What pieces are cut along: rows of the matrix, bytes of a copied tensor."""
        return self.stored.spec.nbytes if self.matrix is None else self.matrix.rows


@dataclass
class Shard:
    """One file to write."""

    name: str
    jobs: list[Job] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(spec.nbytes for job in self.jobs for spec in job.outputs)

    def specs(self) -> Iterator[Spec]:
        """Its tensors in the order of their bytes."""
        for job in self.jobs:
            yield from job.outputs


@dataclass(frozen=True)
class Plan:
    """All of it. `kept` are the modules with a matrix that stay as they are, with the reason."""

    options: Options
    checkpoint: Checkpoint
    shards: tuple[Shard, ...]
    kept: dict[str, str]

    @property
    def jobs(self) -> Iterator[Job]:
        """Every job, in the order of the output."""
        for shard in self.shards:
            yield from shard.jobs

    @property
    def quantized(self) -> dict[str, Job]:
        """Module -> its job."""
        return {
            job.matrix.module: job
            for job in self.jobs
            if job.matrix is not None and job.group_size is not None
        }

    @property
    def parameters(self) -> int:
        """Weights that are quantized."""
        return sum(j.matrix.rows * j.matrix.columns for j in self.quantized.values() if j.matrix)

    @property
    def bytes_read(self) -> int:
        """Bytes of the checkpoint's tensors."""
        return sum(stored.spec.nbytes for stored in self.checkpoint.tensors.values())

    @property
    def bytes_written(self) -> int:
        """Bytes of the tensors to write."""
        return sum(shard.nbytes for shard in self.shards)


def make_plan(checkpoint: Checkpoint, options: Options) -> Plan:
    """Decides everything but the values. Raises ConvertError as selection and options do, and for a
    group size that does not divide a matrix's input size where options say so."""
    matrices = {matrix.module: matrix for matrix in checkpoint.matrices()}
    choice = select(matrices, options, checkpoint.layers)
    if options.lm_head and not any(is_head(name) for name in choice.quantized):
        raise ConvertError(
            "lm_head was asked for, but the checkpoint has no such matrix: it is tied to the "
            "embedding, which stays as it is"
        )
    kept = dict(choice.kept)
    misfits = _misfits([matrices[name] for name in choice.quantized], options)
    group_of: dict[str, int] = {}
    for name in choice.quantized:
        problem = misfits.get(layer_of(name))
        if problem is None:
            group_of[name] = options.weight_group
        elif options.on_indivisible == "channel":
            group_of[name] = CHANNEL
        else:
            kept[name] = f"{problem}, as asked"
    if not group_of:
        raise ConvertError(f"nothing is left to quantize; kept are {_reasons(kept)}")
    return Plan(options, checkpoint, _shards(checkpoint, options, matrices, group_of), kept)


def quantized_specs(
    module: str, rows: int, columns: int, group_size: int, options: Options, dtype: torch.dtype
) -> tuple[Spec, ...]:
    """The tensors that a quantized matrix becomes, in compressed-tensors' layout."""
    groups = 1 if group_size == CHANNEL else columns // group_size
    scale = Spec(f"{module}.weight_scale", dtype, (rows, groups))
    if options.details.kind == "float":
        if options.in_blocks(group_size):
            scale = Spec(scale.name, dtype, (rows // group_size, groups))
        return Spec(f"{module}.weight", FP8, (rows, columns)), scale
    if options.weight_format == INT_QUANTIZED:
        return Spec(f"{module}.weight", torch.int8, (rows, columns)), scale
    assert options.weight_format == PACK_QUANTIZED
    per_word = WORD_BITS // options.details.bits
    packed = Spec(f"{module}.weight_packed", torch.int32, (rows, -(-columns // per_word)))
    specs = [packed, scale, Spec(f"{module}.weight_shape", torch.int64, (2,))]
    if not options.symmetric:
        words = (-(-rows // per_word), groups)
        specs.append(Spec(f"{module}.weight_zero_point", torch.int32, words))
    return tuple(specs)


def _misfits(matrices: list[Matrix], options: Options) -> dict[str, str]:
    """Layer -> why groups or blocks do not fit it, of those that they do not: what vLLM runs as one
    has one size of groups. Raises ConvertError where options say so, and for what cannot be read.
    """
    misfits: dict[str, str] = {}
    for matrix in matrices:
        if matrix.problem:
            raise ConvertError(
                f"{matrix.module}: {matrix.problem}; --ignore with a pattern of these experts "
                "leaves them as they are"
            )
        problem = indivisible(matrix.rows, matrix.columns, options)
        if problem is None:
            continue
        if options.on_indivisible == "error":
            raise ConvertError(
                f"{matrix.module}: {problem}; --on-indivisible channel gives such a layer one "
                "scale per output channel, skip leaves it as it is"
            )
        misfits.setdefault(layer_of(matrix.module), f"{matrix.module}: {problem}")
    return misfits


def indivisible(rows: int, columns: int, options: Options) -> str | None:
    """Why groups or blocks do not fit a matrix of this shape; None where they do."""
    size = options.weight_group
    if size == CHANNEL:
        return None
    in_blocks = options.blocks
    what = "block" if in_blocks else "group"
    if columns % size:
        return f"its input size ({columns}) is no multiple of the {what} size ({size})"
    if in_blocks and rows % size:
        return f"its output size ({rows}) is no multiple of the block size ({size})"
    if in_blocks and columns == size:
        # compressed-tensors tells blocks by the shape of their scales, and takes [N, 1] for rows'.
        return f"its input size ({columns}) is a single block, which readers mistake"
    return None


def _jobs(
    checkpoint: Checkpoint,
    options: Options,
    matrices: dict[str, Matrix],
    group_of: dict[str, int],
) -> Iterator[Job]:
    """A job for each output, in the order of the checkpoint's tensors."""
    by_tensor: dict[str, list[Matrix]] = {}
    for matrix in matrices.values():
        by_tensor.setdefault(matrix.stored.spec.name, []).append(matrix)
    for name, stored in checkpoint.tensors.items():
        if name.endswith(BLOCK_SCALE) and name.removesuffix(BLOCK_SCALE) in checkpoint.tensors:
            continue  # it goes with its weight
        chosen = [matrix for matrix in by_tensor.get(name, []) if matrix.module in group_of]
        if not chosen:
            block_scale = checkpoint.tensors.get(name + BLOCK_SCALE)
            if block_scale is None:
                yield Job(stored, (stored.spec,))
            else:
                matrix = by_tensor[name][0]
                yield Job(stored, (Spec(name, matrix.dtype, stored.spec.shape),), matrix)
            continue
        for matrix in chosen:
            size = group_of[matrix.module]
            specs = quantized_specs(
                matrix.module, matrix.rows, matrix.columns, size, options, matrix.dtype
            )
            yield Job(stored, specs, matrix, size)


def _shards(
    checkpoint: Checkpoint,
    options: Options,
    matrices: dict[str, Matrix],
    group_of: dict[str, int],
) -> tuple[Shard, ...]:
    shards = [Shard("")]
    filled = 0
    for job in _jobs(checkpoint, options, matrices, group_of):
        size = sum(spec.nbytes for spec in job.outputs)
        if shards[-1].jobs and filled + size > options.shard_bytes:
            shards.append(Shard(""))
            filled = 0
        shards[-1].jobs.append(job)
        filled += size
    count = len(shards)
    for number, shard in enumerate(shards, 1):
        shard.name = (
            "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        )
    return tuple(shards)


def _reasons(kept: dict[str, str]) -> str:
    counts: dict[str, int] = {}
    for reason in kept.values():
        counts[reason] = counts.get(reason, 0) + 1
    return ", ".join(f"{count} x {reason}" for reason, count in counts.items()) or "no matrices"
