# SPDX-License-Identifier: Apache-2.0
"""guard.py: a right kernel passes, however it rounds its activations; a wrong one does not."""

import dataclasses

import pytest
from bench_formats import FORMATS, SMALL_CACHE, activations, format_name, needs_extension

from vllm_plugin_tm.bench import guard, peers
from vllm_plugin_tm.bench.cases import DTYPES, Format
from vllm_plugin_tm.bench.peers import Rounding
from vllm_plugin_tm.bench.weights import random_weights
from vllm_plugin_tm.kernels import ops
from vllm_plugin_tm.quantization.support_matrix import CHANNEL


def _scaled(peer, factor, which=0):
    """The peer with the results of one copy scaled."""
    wrong = list(peer.applies)
    right = wrong[which]
    wrong[which] = lambda x: (right(x).float() * factor).to(x.dtype)
    return dataclasses.replace(peer, applies=tuple(wrong))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", [0, -1])
def test_guard_refuses_a_scale_that_is_one_percent_off(dtype, which):
    layer = random_weights(136, 64, Format(32, True, dtype))
    peer = _scaled(peers.torch_linear(layer, SMALL_CACHE), 1.01, which)
    with pytest.raises(guard.WrongResultError, match=r"torch computes a wrong result: N=136, K=64"):
        guard.check(peer, activations(layer, 16))


@needs_extension
@pytest.mark.parametrize(
    "form", [f for f in FORMATS if f.facts.rounds_activations], ids=format_name
)
def test_guard_holds_our_rounding_to_the_bound_of_the_dtype(form):
    layer = random_weights(136, 64, form)
    peer = _scaled(peers.ours(layer, ops.get_isa(), SMALL_CACHE), 1.01)
    with pytest.raises(guard.WrongResultError, match=r"tm .* computes a wrong result"):
        guard.check(peer, activations(layer, 16))


def _rounding_peer(layer, divisor, factor=1.0):
    """A right kernel that rounds x to integers of its own choice, in float64."""

    def apply(x):
        step = x.double().abs().amax(1, keepdim=True) / divisor
        codes = (x.double() / step).round().clamp(-128, 127)
        return (factor * (codes * step) @ layer.exact().T).to(x.dtype)

    return peers.Peer("other", "", layer, 1, (apply,) * 2, Rounding.OWN)


_INTEGER_FORMATS = [Format(32, True, "bf16", "w4a8"), Format(CHANNEL, True, "f32", "w8a8")]


@pytest.mark.parametrize("form", _INTEGER_FORMATS, ids=format_name)
@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("k", [64, 4096])
@pytest.mark.parametrize("divisor", [127.0, 127.5, 128.0])
def test_guard_takes_another_rounding_of_x(form, m, k, divisor):
    layer = random_weights(192, k, form)
    assert guard.check(_rounding_peer(layer, divisor), activations(layer, m)) > 0.0


@pytest.mark.parametrize("form", _INTEGER_FORMATS, ids=format_name)
@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("wrong", [{"divisor": 63.5}, {"divisor": 127.0, "factor": 1.03}], ids=str)
def test_guard_refuses_coarser_codes_and_wrong_scales(form, m, wrong):
    layer = random_weights(192, 4096, form)
    with pytest.raises(guard.WrongResultError, match="other computes a wrong result"):
        guard.check(_rounding_peer(layer, **wrong), activations(layer, m))


def test_guard_refuses_what_is_not_a_number():
    layer = random_weights(64, 64, Format(32))
    peer = peers.Peer("torch", "", layer, 1, (lambda x: x * float("nan"),) * 2)
    with pytest.raises(guard.WrongResultError, match="relative error nan"):
        guard.check(peer, activations(layer))
