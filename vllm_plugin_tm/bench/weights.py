# SPDX-License-Identifier: Apache-2.0
"""Random layers as a checkpoint holds them, and sets of them that no cache
holds. No kernel in here."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from vllm_plugin_tm.bench import float_codes
from vllm_plugin_tm.bench.cases import Format
from vllm_plugin_tm.kernels import reference
from vllm_plugin_tm.quantization.support_matrix import CHANNEL

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
T = TypeVar("T")
_CHUNK = 512  # output channels dequantized at once: bounds the float32 temporaries
_WORD_BITS = 32


@dataclass(frozen=True)
class Weights:
    """One layer as a checkpoint holds it.

    codes int32 [N, K*bits/32], the lowest bits first, scale [N, G] in the activations' dtype,
    zero_point int32 [N*bits/32, G] or None. W8A8: codes int8 [N, K], scale float32 [N, 1], no
    zero_point; an asymmetric format is one of activations. FP8: codes float8_e4m3fn [N, K], scale
    float32 [N, G], repeated where a block of channels shares one. FP4: codes uint8 [N, K/2], scale
    uint8 [N, G]; NVFP4 with channel_scale float32 [N].
    """

    n: int
    k: int
    format: Format
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    channel_scale: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """That of the activations."""
        return DTYPES[self.format.dtype]

    @property
    def bytes(self) -> int:
        """Bytes of the tensors on disk, where blocks have one scale, and so have all channels
        together beside those of groups."""
        scales = tensor_bytes(self.scale)
        if self.channel_scale is not None:
            scales += self.channel_scale.element_size()
        floats = self.format.facts.floats
        if floats and floats.block:
            rows = self.n if self.format.group_size == CHANNEL else self.format.group_size
            scales = scales // self.n * -(-self.n // rows)
        return tensor_bytes(self.codes) + scales + tensor_bytes(self.zero_point)

    def symmetric(self) -> "Weights":
        """The same codes and scales without zero points."""
        return replace(self, format=replace(self.format, symmetric=True), zero_point=None)

    def copies(self, llc_bytes: int) -> "list[Weights]":
        """Itself and twins in other memory, together at least four times the last-level cache."""

        def cloned(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.clone()

        def twin() -> Weights:
            return replace(
                self,
                codes=self.codes.clone(),
                scale=self.scale.clone(),
                zero_point=cloned(self.zero_point),
                channel_scale=cloned(self.channel_scale),
            )

        return [self, *repeated(twin, self.bytes, llc_bytes)]

    def channels(self, begin: int, end: int) -> "Weights":
        """Output channels [begin, end), both multiples of 8."""
        per_word = _WORD_BITS // self.format.facts.weight_bits
        zero = self.zero_point
        if zero is not None:
            zero = zero[begin // per_word : end // per_word]
        channels = self.channel_scale
        return replace(
            self,
            n=end - begin,
            codes=self.codes[begin:end],
            scale=self.scale[begin:end],
            zero_point=zero,
            channel_scale=None if channels is None else channels[begin:end],
        )

    def exact(self) -> Tensor:
        """The real weights, float64 [N, K]."""
        if self.format.facts.floats:
            tensors = (self.codes, self.scale, self.channel_scale)
            return float_codes.exact(self.format.facts.floats, *tensors)
        bits = self.format.facts.weight_bits
        return reference.dequantize(self.codes, self.scale, self.zero_point, self.k, bits)

    def dequantized(self) -> Tensor:
        """[N, K] in the activations' dtype: `exact` in float32, where only float32 scales round."""
        bits = self.format.facts.weight_bits
        out = torch.empty(self.n, self.k, dtype=self.dtype)
        for begin in range(0, self.n, _CHUNK):
            part = self.channels(begin, min(begin + _CHUNK, self.n))
            if self.format.facts.floats:
                out[begin : begin + part.n] = part.exact().to(self.dtype)
                continue
            codes = part.codes
            if codes.dtype != torch.int8:
                codes = reference.unpack(codes, bits, self.k)
            values = codes.view(*part.scale.shape, -1).float()
            if part.zero_point is not None:
                values -= reference.unpack(part.zero_point.t(), bits, part.n).t().unsqueeze(-1)
            values *= part.scale.float().unsqueeze(-1)
            out[begin : begin + part.n] = values.view(part.n, self.k)
        return out


def random_weights(n: int, k: int, form: Format, seed: int = 0) -> Weights:
    """Random codes, zero points, and scales within a factor of three of each other."""
    generator = torch.Generator().manual_seed(seed)
    facts = form.facts
    groups = 1 if form.group_size == CHANNEL else k // form.group_size
    per_word = _WORD_BITS // facts.weight_bits
    if facts.floats:
        group = k // groups
        codes, scale, channels = float_codes.random(facts.floats, n, k, group, generator)
        return Weights(n, k, form, codes, scale, None, channels)

    def words(rows: int, columns: int) -> Tensor:
        return torch.randint(
            -(2**31), 2**31, (rows, columns), dtype=torch.int32, generator=generator
        )

    # So that rows of y are about as large as rows of x, whatever the largest code.
    largest = 2 ** (facts.weight_bits - 1)
    scale = 2 * (0.5 + torch.rand(n, groups, generator=generator)) / (largest * k**0.5)
    codes = words(n, k // per_word)
    if not facts.grouped:
        return Weights(n, k, form, codes.view(torch.int8), scale, None)
    zero = None if form.symmetric else words(n // per_word, groups)
    return Weights(n, k, form, codes, scale.to(DTYPES[form.dtype]), zero)


def copies_needed(weight_bytes: int, llc_bytes: int) -> int:
    """So many that a set is at least four times the last-level cache, and two at least."""
    return max(2, -(-4 * llc_bytes // weight_bytes))


def repeated(make: Callable[[], T], size: int, llc_bytes: int) -> list[T]:
    """What `make` makes for the rest of a rotating set whose first copy of `size` bytes exists.

    On one thread: a small matrix has hundreds of copies, each too small to be worth a wake-up.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [make() for _ in range(copies_needed(size, llc_bytes) - 1)]
    finally:
        torch.set_num_threads(threads)


def tensor_bytes(tensor: Tensor | None) -> int:
    """Bytes of the elements, 0 for None."""
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
