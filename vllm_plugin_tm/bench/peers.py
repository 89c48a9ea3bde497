# SPDX-License-Identifier: Apache-2.0
"""Who is measured: our kernel, upstream vLLM's and torch's own product, with their weights.

All start from the same random checkpoint tensors and are prepared as they are in service: by our
packing op, by upstream's own class, by dequantization. No forward math of ours is in here.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from vllm_plugin_tm.bench.cases import CHANNEL, OURS, TORCH, UPSTREAM, Format
from vllm_plugin_tm.bench.timing import Step
from vllm_plugin_tm.kernels import ops, reference

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
T = TypeVar("T")
_CHUNK = 512  # output channels dequantized at once: bounds the float64 temporaries


class UnavailableError(RuntimeError):
    """A peer cannot run this format here; the message says why."""


@dataclass(frozen=True)
class Weights:
    """One layer as a compressed-tensors checkpoint holds it.

    weight_packed int32 [N, K/8], scale [N, G] in the activations' dtype, zero_point int32
    [N/8, G] or None.
    """

    n: int
    k: int
    format: Format
    weight_packed: Tensor
    scale: Tensor
    zero_point: Tensor | None

    @property
    def bytes(self) -> int:
        """Bytes of the three tensors."""
        return sum(_bytes(t) for t in (self.weight_packed, self.scale, self.zero_point))

    def symmetric(self) -> "Weights":
        """The same codes and scales without zero points."""
        form = Format(self.format.group_size, True, self.format.dtype)
        return Weights(self.n, self.k, form, self.weight_packed, self.scale, None)

    def copies(self, llc_bytes: int) -> "list[Weights]":
        """Itself and twins in other memory, together at least four times the last-level cache."""
        zero = self.zero_point

        def twin() -> Weights:
            codes, scale = self.weight_packed.clone(), self.scale.clone()
            zeros = None if zero is None else zero.clone()
            return Weights(self.n, self.k, self.format, codes, scale, zeros)

        return [self, *_repeated(twin, self.bytes, llc_bytes)]

    def channels(self, begin: int, end: int) -> "Weights":
        """Output channels [begin, end), both multiples of 8."""
        zero = None if self.zero_point is None else self.zero_point[begin // 8 : end // 8]
        codes, scale = self.weight_packed[begin:end], self.scale[begin:end]
        return Weights(end - begin, self.k, self.format, codes, scale, zero)

    def dequantized(self) -> Tensor:
        """[N, K] in the activations' dtype, each weight rounded once."""
        out = torch.empty(self.n, self.k, dtype=self.scale.dtype)
        for begin in range(0, self.n, _CHUNK):
            part = self.channels(begin, min(begin + _CHUNK, self.n))
            out[begin : begin + part.n] = reference.dequantize_w4(
                part.weight_packed, part.scale, part.zero_point, self.k
            )
        return out


def random_weights(n: int, k: int, form: Format, seed: int = 0) -> Weights:
    """Random codes, zero points, and scales within a factor of three of each other."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if form.group_size == CHANNEL else k // form.group_size

    def words(rows: int, columns: int) -> Tensor:
        return torch.randint(
            -(2**31), 2**31, (rows, columns), dtype=torch.int32, generator=generator
        )

    scale = (0.5 + torch.rand(n, groups, generator=generator)) / (4 * k**0.5)
    zero = None if form.symmetric else words(n // 8, groups)
    return Weights(n, k, form, words(n, k // 8), scale.to(DTYPES[form.dtype]), zero)


@dataclass(frozen=True)
class Peer:
    """A kernel with a rotating set of weight copies.

    `weight_bytes` of one copy as the kernel reads it; `applies[i](x)` computes with copy i;
    `isa` is what our kernel is to run on, "" for others.
    """

    name: str
    isa: str
    weight_bytes: int
    applies: tuple[Callable[[Tensor], Tensor], ...]

    @property
    def label(self) -> str:
        return f"{self.name} {self.isa}" if self.isa else self.name

    def step(self, x: Tensor) -> Step:
        """A step for timing: every call uses the next copy."""
        turn = itertools.cycle(self.applies)
        return lambda: next(turn)(x)

    def select(self) -> None:
        """Makes this peer's instruction set the one in use; for others nothing."""
        if self.isa:
            ops.set_isa(self.isa)


def copies_needed(weight_bytes: int, llc_bytes: int) -> int:
    """So many that a set is at least four times the last-level cache, and two at least."""
    return max(2, -(-4 * llc_bytes // weight_bytes))


def _repeated(make: Callable[[], T], size: int, llc_bytes: int) -> list[T]:
    """What `make` makes for the rest of a rotating set whose first copy of `size` bytes exists.

    On one thread: a small matrix has hundreds of copies, each too small to be worth a wake-up.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [make() for _ in range(copies_needed(size, llc_bytes) - 1)]
    finally:
        torch.set_num_threads(threads)


def pack(weights: Weights) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel layout of our op: weight, scale, zero point (empty when symmetric)."""
    ops.load()
    return torch.ops.vllm_plugin_tm.w4a16_pack(
        weights.weight_packed, weights.scale, weights.zero_point, weights.k
    )


def ours(weights: Weights, isa: str, llc_bytes: int, name: str = OURS) -> Peer:
    """Our kernel. Every copy is packed anew, so that it lies in memory as in service."""
    first = pack(weights)
    size = sum(_bytes(t) for t in first)
    copies = [first, *_repeated(lambda: pack(weights), size, llc_bytes)]
    linear = torch.ops.vllm_plugin_tm.w4a16_linear
    n, group_size = weights.n, weights.format.group_size
    symmetric = weights.zero_point is None

    def apply(weight: Tensor, scale: Tensor, zero: Tensor | None) -> Callable[[Tensor], Tensor]:
        return lambda x: linear(x, weight, scale, zero, None, n, group_size)

    applies = tuple(apply(w, s, None if symmetric else z) for w, s, z in copies)
    return Peer(name, isa, size, applies)


def torch_linear(weights: Weights, llc_bytes: int) -> Peer:
    """torch's product with the dequantized weights, in the activations' dtype."""
    first = weights.dequantized()
    copies = [first, *_repeated(first.clone, _bytes(first), llc_bytes)]

    def apply(weight: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.nn.functional.linear(x, weight)

    return Peer(TORCH, "", _bytes(first), tuple(apply(w) for w in copies))


def upstream(weights: Weights, llc_bytes: int) -> Peer:
    """vLLM's CPU kernel, prepared and called by vLLM's own class.

    Raises:
        UnavailableError: vLLM is missing, or its kernel does not take this format.
    """
    try:
        from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
        from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
            MPLinearLayerConfig,
        )
        from vllm.scalar_type import scalar_types
    except ImportError as error:
        raise UnavailableError(f"upstream's kernel cannot be imported: {error}") from error

    dtype = DTYPES[weights.format.dtype]
    if dtype == torch.float32:
        # Its can_implement does not look at the dtype; the kernel then fails when called.
        raise UnavailableError("upstream's kernel takes bf16 and f16 only")
    asymmetric = weights.zero_point is not None
    config = MPLinearLayerConfig(
        full_weight_shape=(weights.k, weights.n),
        partition_weight_shape=(weights.k, weights.n),
        weight_type=scalar_types.uint4 if asymmetric else scalar_types.uint4b8,
        act_type=dtype,
        group_size=weights.format.group_size,
        zero_points=asymmetric,
    )
    able, reason = CPUWNA16LinearKernel.can_implement(config)
    if not able:
        raise UnavailableError(f"upstream: {reason}")
    names = ("weight_packed", "weight_scale", "weight_zero_point")
    kernel = CPUWNA16LinearKernel(config, *names)
    layer = _upstream_layer(weights)
    kernel.process_weights_after_loading(layer)
    size = sum(_bytes(getattr(layer, name, None)) for name in names)
    layers = [layer, *_repeated(lambda: _copy_of(layer, names), size, llc_bytes)]

    def apply(layer: torch.nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: kernel.apply_weights(layer, x)

    return Peer(UPSTREAM, "", size, tuple(apply(layer) for layer in layers))


def _upstream_layer(weights: Weights) -> torch.nn.Module:
    """A layer as vLLM's compressed-tensors scheme leaves it for the kernel class."""
    layer = torch.nn.Module()
    order = {"input_dim": 1, "output_dim": 0}
    tensors = {
        "weight_packed": (weights.weight_packed, {**order, "packed_dim": 1}),
        "weight_scale": (weights.scale, order),
        "weight_zero_point": (weights.zero_point, {**order, "packed_dim": 0}),
    }
    for name, (tensor, attributes) in tensors.items():
        if tensor is None:
            continue
        parameter = torch.nn.Parameter(tensor.clone(), requires_grad=False)
        for attribute, value in attributes.items():
            setattr(parameter, attribute, value)
        layer.register_parameter(name, parameter)
    setattr(layer, "bias", None)  # noqa: B010 - a plain assignment has no type that fits
    return layer


def _copy_of(layer: torch.nn.Module, names: tuple[str, ...]) -> torch.nn.Module:
    """A prepared layer's twin in other memory, whatever else the class has set on it."""
    twin = torch.nn.Module()
    for name, value in vars(layer).items():
        if not name.startswith("_"):
            setattr(twin, name, value)
    for name in names:
        tensor = getattr(layer, name, None)
        setattr(twin, name, None if tensor is None else _cloned(tensor))
    return twin


def _cloned(tensor: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor.data.clone(), requires_grad=False)


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
