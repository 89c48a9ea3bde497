# SPDX-License-Identifier: Apache-2.0
"""Random layers of routed experts as a checkpoint holds them, and the tokens that are sent through
them. No kernel in here."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_plugin_tm.bench.cases import Format
from vllm_plugin_tm.bench.moe_cases import Layer, MoeCase
from vllm_plugin_tm.bench.weights import DTYPES, Weights, random_weights
from vllm_plugin_tm.kernels import reference_moe

# Prime, so that every copy of the weights meets every routing; so many that even one token a call
# visits most experts.
_ROUTINGS = 31
_TOKEN_SEED = 77


@dataclass(frozen=True)
class MoeWeights:
    """All experts of a layer: `w13` and `w2` hold the rows of one expert after another's."""

    layer: Layer
    w13: Weights
    w2: Weights

    @property
    def format(self) -> Format:
        return self.w13.format

    def expert(self, product: Weights, expert: int) -> Weights:
        """One expert's part of `w13` or `w2`."""
        rows = product.n // self.layer.experts
        return product.channels(expert * rows, (expert + 1) * rows)

    def as_reference(self, product: Weights) -> reference_moe.Experts:
        """`w13` or `w2` as the oracle takes it."""

        def of_experts(tensor: Tensor) -> Tensor:
            return tensor.view(self.layer.experts, -1, tensor.shape[1])

        zero, channels = product.zero_point, product.channel_scale
        floats = self.format.facts.floats
        return reference_moe.Experts(
            of_experts(product.codes),
            of_experts(product.scale),
            None if zero is None else of_experts(zero),
            bits=self.format.facts.weight_bits,
            channel_scale=None if channels is None else channels.view(self.layer.experts, -1),
            scale_type=floats.scale_type if floats else "",
        )


@dataclass(frozen=True)
class Routed:
    """What a call takes beside the weights: x [T, H], topk_weights float32 and topk_ids int32
    [T, top_k]."""

    x: Tensor
    topk_weights: Tensor
    topk_ids: Tensor

    @property
    def experts(self) -> int:
        """How many experts the call touches."""
        return len(self.topk_ids.unique())


def random_experts(layer: Layer, form: Format, seed: int = 0) -> MoeWeights:
    """Random codes and scales: see weights.random_weights."""
    (n13, k13), (n2, k2) = layer.products
    w13 = random_weights(layer.experts * n13, k13, form, seed)
    return MoeWeights(layer, w13, random_weights(layer.experts * n2, k2, form, seed + 1))


def checked_token(layer: Layer, dtype: str) -> Routed:
    """The token whose result is compared with the oracle, the same for every number of tokens: the
    oracle takes seconds for each expert of a large layer."""
    return _random(layer, 1, dtype, torch.Generator().manual_seed(_TOKEN_SEED))


def calls_of(case: MoeCase, checked: Routed) -> tuple[Routed, ...]:
    """What calls of a case take in turn: another routing each, the same x, as the layer before has
    just written it. The first call has the checked token in its first and last row."""
    generator = torch.Generator().manual_seed(case.m)
    calls = [_random(case.layer, case.m, case.format.dtype, generator) for _ in range(_ROUTINGS)]
    x = calls[0].x
    for ends in (0, -1):
        x[ends] = checked.x[0]
        calls[0].topk_weights[ends] = checked.topk_weights[0]
        calls[0].topk_ids[ends] = checked.topk_ids[0]
    return tuple(Routed(x, call.topk_weights, call.topk_ids) for call in calls)


def _random(layer: Layer, tokens: int, dtype: str, generator: torch.Generator) -> Routed:
    """Any experts for each token, none twice, and weights that add up to one."""
    x = torch.randn(tokens, layer.hidden, generator=generator).to(DTYPES[dtype])
    scores = torch.rand(tokens, layer.experts, generator=generator)
    top = scores.topk(layer.top_k, dim=1)
    weights = top.values / top.values.sum(1, keepdim=True)
    return Routed(x, weights, top.indices.int())
