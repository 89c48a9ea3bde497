# SPDX-License-Identifier: Apache-2.0
"""Carrying out a plan: pieces of rows, read, quantized and written by several threads.

A thread reads its piece while others compute and write theirs (torch and the system calls let go of
the interpreter), and holds no more than its piece. What a piece becomes depends on nothing but its
rows.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_plugin_tm.quantization.convert import compiled
from vllm_plugin_tm.quantization.convert.destination import Destination
from vllm_plugin_tm.quantization.convert.errors import ConvertError
from vllm_plugin_tm.quantization.convert.options import BLOCK, INT_QUANTIZED, Options
from vllm_plugin_tm.quantization.convert.plan import Job, Plan
from vllm_plugin_tm.quantization.convert.rounding import (
    NotFiniteError,
    Reduce,
    Rounding,
    check_finite,
    quantize_fp8,
    quantize_fp8_block,
    quantize_int,
)
from vllm_plugin_tm.quantization.convert.safetensors_file import Reader
from vllm_plugin_tm.quantization.support_matrix import WORD_BITS

PIECE_WEIGHTS = 1 << 20
"""Weights of a piece, where memory allows. Threads take turns in the interpreter between the steps
of a piece: of 2 on two cores of Zen 3, pieces of 2**16 weights made 124 M weights/s, of 2**18 291,
of 2**20 349."""

# Of a weight in a piece: read, written, float32 copies and the library's 32-bit integers.
_PIECE_BYTES = 54
_ROWS = 8  # zero points of 8 rows share a word

Progress = Callable[[int], None]
"""Told of every piece: the bytes of the checkpoint that it was made of."""


@dataclass(frozen=True)
class Piece:
    """Rows `begin` to `end` of a job's matrix, or bytes of its tensor; `number` counts all."""

    number: int
    job: Job
    begin: int
    end: int

    @property
    def source_bytes(self) -> int:
        """Bytes of the checkpoint that it is made of."""
        if self.job.matrix is None:
            return self.end - self.begin
        itemsize = self.job.stored.spec.dtype.itemsize
        return (self.end - self.begin) * self.job.matrix.columns * itemsize


def pieces(plan: Plan, weights: int) -> Iterator[Piece]:
    """Everything there is to do, in the order of the output, in pieces of about `weights` weights
    (bytes of what is copied)."""
    number = 0
    for job in plan.jobs:
        step = _step(job, plan.options, weights)
        for begin in range(0, max(job.rows, 1), step):
            yield Piece(number, job, begin, min(begin + step, job.rows))
            number += 1


def memory_of_piece(plan: Plan, weights: int) -> int:
    """Bytes that a thread holds at most for its piece."""
    most = 0
    for job in plan.jobs:
        step = min(_step(job, plan.options, weights), job.rows)
        if job.matrix is None:
            most = max(most, step)
            continue
        need = step * job.matrix.columns * _PIECE_BYTES
        if job.matrix.transposed:
            shape = job.stored.spec.shape
            need += shape[-1] * shape[-2] * job.stored.spec.dtype.itemsize
        most = max(most, need)
    return most


def write_all(
    plan: Plan,
    destination: Destination,
    *,
    weights: int,
    workers: int,
    progress: Progress,
    stop: threading.Event,
) -> None:
    """Makes every piece that is not on disk yet.

    Returns early, with what is written noted, when `stop` is set. Raises the first error of any
    thread, after all have ended.
    """
    reader = Reader()
    done = destination.done
    todo = (piece for piece in pieces(plan, weights) if piece.number not in done)
    lock = threading.Lock()
    errors: list[BaseException] = []

    def work() -> None:
        torch.set_num_threads(1)  # of this thread: its pieces are its share of the machine
        while not stop.is_set() and not errors:
            with lock:
                piece = next(todo, None)
            if piece is None:
                return
            try:
                for name, data, first in make_piece(piece, plan, reader):
                    destination.write(name, data, first)
                destination.mark(piece.number)
                progress(piece.source_bytes)
            except BaseException as error:
                errors.append(error)
                return

    threads_before = torch.get_num_threads()
    threads = [threading.Thread(target=work, name=f"convert-{n}") for n in range(workers)]
    try:
        reader.open(plan.checkpoint.files)
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.05)  # not join: an interrupt is to be heard at once
    except BaseException:
        stop.set()
        raise
    finally:
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        torch.set_num_threads(threads_before)
        reader.close()
    if errors:
        raise errors[0]


def make_piece(piece: Piece, plan: Plan, reader: Reader) -> Iterator[tuple[str, Tensor, int]]:
    """What a piece becomes: name of the tensor, values, number of the first value in it.

    Raises ConvertError naming tensor, place and value for weights that are no finite numbers.
    """
    job, options = piece.job, plan.options
    if job.matrix is None:
        first = piece.begin // job.stored.spec.dtype.itemsize
        count = (piece.end - piece.begin) // job.stored.spec.dtype.itemsize
        yield job.outputs[0].name, reader.read(job.stored, first, (count,)), first
        return
    matrix = job.matrix
    weight = matrix.read(reader, piece.begin, piece.end, plan.checkpoint.block)
    if job.group_size is None:
        first = piece.begin * matrix.columns
        yield job.outputs[0].name, weight.to(matrix.dtype), first
        return
    outputs = {spec.name.removeprefix(f"{matrix.module}."): spec for spec in job.outputs}
    try:
        tensors = quantize(weight, job.group_size, options, matrix.dtype)
    except NotFiniteError as error:
        raise ConvertError(error.text(f"{matrix.module}.weight", piece.begin)) from None
    for name, data in tensors.items():
        spec = outputs[name]
        first = piece.begin // rows_of_one(name, job.group_size, options)
        yield spec.name, data, first * spec.shape[1]
    if piece.begin == 0 and "weight_shape" in outputs:
        shape = torch.tensor([matrix.rows, matrix.columns])
        yield outputs["weight_shape"].name, shape, 0


def quantize(
    weight: Tensor,
    group_size: int,
    options: Options,
    scale_dtype: torch.dtype,
    reduce: Reduce | None = None,
) -> dict[str, Tensor]:
    """Rows of a matrix [N, K] in the layout of the options' format.

    The values of `weight_scale` and, by format, `weight_packed` and `weight_zero_point`, or
    `weight`. `reduce` is rounding's. N is a multiple of unit_rows() unless the rows are the
    matrix's last. Raises NotFiniteError for weights that are infinite or not a number.
    """
    if options.details.kind == "float":
        check_finite(weight)
        power_of_two = options.scales == "ue8m0"
        if options.in_blocks(group_size):
            codes, scale = quantize_fp8_block(
                weight, group_size, scale_dtype, power_of_two=power_of_two
            )
        else:
            codes, scale = quantize_fp8(weight, scale_dtype, reduce, power_of_two=power_of_two)
        return {"weight": codes, "weight_scale": scale}
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    rounding = Rounding(
        options.details.bits, group_size, options.symmetric, options.method, options.mse_weight
    )
    packed = options.weight_format != INT_QUANTIZED
    made = None
    if reduce is None:
        made = compiled.quantize_weights(weight, rounding, scale_dtype, packed=packed)
    if made is None:
        check_finite(weight)
        codes, scale, zero = quantize_int(weight, rounding, scale_dtype, reduce)
        made = (pack_to_int32(codes, rounding.bits) if packed else codes), scale, zero
    codes, scale, zero = made
    if not packed:
        return {"weight": codes, "weight_scale": scale}
    tensors = {"weight_packed": codes, "weight_scale": scale}
    if zero is not None:
        tensors["weight_zero_point"] = pack_to_int32(zero, rounding.bits, packed_dim=0)
    return tensors


def default_workers() -> int:
    """One for each processor this process may run on."""
    return len(os.sched_getaffinity(0))


def _step(job: Job, options: Options, weights: int) -> int:
    """Rows (bytes) of a piece of this job."""
    if job.matrix is None:
        size = job.stored.spec.dtype.itemsize
        return max(weights // size, 1) * size
    if job.matrix.transposed:
        return job.matrix.rows  # its columns lie apart in the file
    unit = BLOCK if job.matrix.block_scale is not None else unit_rows(options)
    return max(weights // job.matrix.columns // unit, 1) * unit


def unit_rows(options: Options) -> int:
    """Of how many rows pieces of a matrix are multiples."""
    return BLOCK if options.blocks else _ROWS


def rows_of_one(name: str, group_size: int, options: Options) -> int:
    """Rows of a matrix that one row of its tensor `name` is for."""
    if name == "weight_zero_point":
        return WORD_BITS // options.details.bits
    return group_size if options.in_blocks(group_size) and name == "weight_scale" else 1
