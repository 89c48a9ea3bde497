# SPDX-License-Identifier: Apache-2.0
"""Who is measured: our kernel and torch's own product here, upstream vLLM's in upstream.py.

All start from the same random checkpoint tensors and are prepared as they are in service: by our
packing op, by upstream's own class, by dequantization. No forward math of ours is in here.
"""

import enum
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_plugin_tm.bench.cases import OURS, TORCH, Format
from vllm_plugin_tm.bench.timing import Step
from vllm_plugin_tm.bench.weights import Weights, repeated, tensor_bytes
from vllm_plugin_tm.kernels import ops
from vllm_plugin_tm.quantization import small_floats

Apply = Callable[[Tensor], Tensor]


class UnavailableError(RuntimeError):
    """A peer cannot run this format here; the message says why."""


class Rounding(enum.Enum):
    """What a kernel does to its activations, and so what its result is compared with."""

    NONE = "their dtype's bits"
    CHECKPOINT = "8-bit integers as compressed-tensors defines them, e4m3 as vLLM does"
    OWN = "8-bit integers, rounded in a way of its own"


@dataclass(frozen=True)
class Kernel:
    """Who is timed. `isa` is what our kernel is to run on, "" for others."""

    name: str
    isa: str

    @property
    def label(self) -> str:
        return f"{self.name} {self.isa}" if self.isa else self.name

    def select(self) -> None:
        """Makes this kernel's instruction set the one in use; for others nothing."""
        if self.isa:
            ops.set_isa(self.isa)


@dataclass(frozen=True)
class Peer(Kernel):
    """A kernel with a rotating set of weight copies.

    `weights` is what the copies were made from, `weight_bytes` of one copy as the kernel reads it;
    `applies[i](x)` computes with copy i.
    `most_rows`: beyond it a call takes seconds, so that it is not measured there. `lazy`: the first
    call of a copy, or of a batch size, makes what later calls use.
    """

    weights: Weights
    weight_bytes: int
    applies: tuple[Apply, ...]
    rounding: Rounding = Rounding.NONE
    most_rows: int | None = None
    lazy: bool = False

    def step(self, x: Tensor) -> Step:
        """A step for timing: every call uses the next copy."""
        turn = itertools.cycle(self.applies)
        return lambda: next(turn)(x)

    def read_once(self, x: Tensor) -> None:
        """Computes with every copy, x [1, K]. What has only been written is read more slowly the
        first time (on two cores of a Granite Rapids at half the rate), and no sample would show
        weights as they are in service."""
        self.select()
        for apply in self.applies:
            apply(x)

    def warm(self, x: Tensor) -> None:
        """Gets a lazy peer over its first calls, so that none of them is timed."""
        for apply in self.applies if self.lazy else ():
            apply(x)


def pack(weights: Weights, gate_up: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel layout of our op: weight, scale, and zero point (empty when symmetric), for W8A8
    the weights' sums instead, for NVFP4 the scales of channels. `gate_up`: the first half of the
    rows are gates of an expert."""
    ops.load()
    namespace = torch.ops.vllm_plugin_tm
    facts = weights.format.facts
    if facts.floats:
        return _pack_floats(weights, gate_up)
    if not facts.grouped:
        return namespace.w8a8_pack(weights.codes, weights.scale, gate_up)
    packer = {4: namespace.w4a16_pack, 8: namespace.w8a16_pack}[facts.weight_bits]
    return packer(
        weights.codes, weights.scale, weights.zero_point, weights.k, facts.weight_bits, gate_up
    )


def _pack_floats(weights: Weights, gate_up: bool) -> tuple[Tensor, Tensor, Tensor]:
    namespace = torch.ops.vllm_plugin_tm
    form, n, k = weights.format, weights.n, weights.k
    if form.facts.weight_bits == 8:
        codes = weights.codes.view(torch.int8)
        return namespace.w8a16_pack(codes, weights.scale, None, k, 8, gate_up)
    words = small_floats.e2m1_words("bench", "weight", weights.codes, n, k)
    weight, scale, none = namespace.w4a16_pack(words, weights.scale, None, k, 4, gate_up)
    if weights.channel_scale is None:
        return weight, scale, none
    # In the order of packed channels: tiles of gates and of ups alternate.
    halves = weights.channel_scale.view(2 if gate_up else 1, -1)
    count = halves.shape[1]
    halves = torch.nn.functional.pad(halves, (0, ops.padded(count) - count))
    tiles = halves.unflatten(1, (-1, ops.TILE_N)).transpose(0, 1)
    return weight, scale, tiles.flatten().contiguous()


def ours(weights: Weights, isa: str, llc_bytes: int, name: str = OURS) -> Peer:
    """Our kernel. Every copy is packed anew, so that it lies in memory as in service."""
    first = pack(weights)
    size = sum(tensor_bytes(t) for t in first)
    copies = [first, *repeated(lambda: pack(weights), size, llc_bytes)]
    applies = tuple(_linear(weights, *copy) for copy in copies)
    return Peer(name, isa, weights, size, applies, our_rounding(weights.format))


def our_rounding(form: Format) -> Rounding:
    """What our kernels do to activations in a format."""
    return Rounding.CHECKPOINT if form.facts.rounds_activations else Rounding.NONE


def _linear(weights: Weights, weight: Tensor, scale: Tensor, third: Tensor) -> Apply:
    """Our op of the weights' scheme with one packed copy."""
    namespace, form, n = torch.ops.vllm_plugin_tm, weights.format, weights.n
    group, floats = form.group_size, form.facts.floats
    if floats and floats.op == "fp8":
        fp8, rounding = namespace.fp8_linear, floats.x_rounding
        return lambda x: fp8(x, weight, scale, None, n, group, rounding)
    if floats:
        fp4, channels = namespace.fp4_linear, third if floats.channel_scales else None
        return lambda x: fp4(x, weight, scale, channels, None, n, group, floats.scale_type)
    if form.scheme == "w8a8":
        w8a8 = namespace.w8a8_linear
        return lambda x: w8a8(x, weight, scale, third, None, n, None, None, form.symmetric)
    zero = None if form.symmetric else third
    linear = {
        "w4a16": namespace.w4a16_linear,
        "w8a16": namespace.w8a16_linear,
        "w4a8": namespace.w4a8_linear,
    }[form.scheme]
    return lambda x: linear(x, weight, scale, zero, None, n, group)


def torch_linear(weights: Weights, llc_bytes: int) -> Peer:
    """torch's product with the dequantized weights, in the activations' dtype, no integers."""
    first = weights.dequantized()
    size = tensor_bytes(first)
    copies = [first, *repeated(first.clone, size, llc_bytes)]

    def apply(weight: Tensor) -> Apply:
        return lambda x: torch.nn.functional.linear(x, weight)

    return Peer(TORCH, "", weights, size, tuple(apply(w) for w in copies))
