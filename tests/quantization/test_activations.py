# SPDX-License-Identifier: Apache-2.0
"""activations.py: what a scheme asks for is read rightly, and each request gets the product that
does it, or keeps its activations with the reason."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
import torch

from vllm_plugin_tm import envs
from vllm_plugin_tm.quantization import activations
from vllm_plugin_tm.quantization.activations import Asked, Plan, asked_of, plan
from vllm_plugin_tm.quantization.support_matrix import WEIGHT_TYPES, Machine, Request

HERE = Machine("cpu", "avx2")
TOKEN = Asked(8, "token", None, symmetric=True, dynamic=True)


def request(weight_type="uint4b8", group_size=32, k=256):
    zero_points = WEIGHT_TYPES[weight_type].zero_points
    return Request(weight_type, zero_points, group_size, "bfloat16", k, 64, k)


def layer_with(scheme):
    layer = torch.nn.Module()
    layer.scheme = scheme
    return layer


def test_layers_of_other_methods_ask_for_nothing():
    assert asked_of(torch.nn.Module()) is None
    assert asked_of(layer_with(SimpleNamespace())) is None
    assert asked_of(layer_with(SimpleNamespace(input_quant=None))) is None


@pytest.mark.parametrize("strategy", ["token", SimpleNamespace(value="token")])
def test_the_arguments_of_a_packed_scheme_are_read(strategy):
    arguments = SimpleNamespace(
        num_bits=8, strategy=strategy, group_size=None, symmetric=True, dynamic=True
    )
    assert asked_of(layer_with(SimpleNamespace(input_quant=arguments))) == TOKEN
    arguments.dynamic = "local"
    asked = asked_of(layer_with(SimpleNamespace(input_quant=arguments)))
    assert asked is not None
    assert not asked.dynamic


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("static", [None, False, True])
def test_the_int_quantized_scheme_says_symmetry_only(symmetric, static):
    scheme = SimpleNamespace(input_symmetric=symmetric, is_static_input_scheme=static)
    assert asked_of(layer_with(scheme)) == Asked(8, "token", None, symmetric, not static)


@pytest.mark.parametrize(
    "weight_type", [name for name, kind in WEIGHT_TYPES.items() if kind.packed]
)
def test_nothing_asked_nothing_rounded(weight_type):
    kept = "w4a16" if WEIGHT_TYPES[weight_type].bits <= 4 else "w8a16"
    assert plan(request(weight_type), HERE, None) == Plan(kept)


@pytest.mark.parametrize("weight_type", ["int4", "uint4b8", "uint4", "uint3b4", "uint2"])
@pytest.mark.parametrize("group_size", [8, 32, -1])
def test_tokens_over_four_bits(weight_type, group_size):
    got = plan(request(weight_type, group_size), HERE, TOKEN)
    assert got == Plan("w4a8", False, "int8 activations, per token")


def test_groups_of_the_weights_own_size():
    asked = Asked(8, "group", 64, symmetric=True, dynamic=True)
    got = plan(request(group_size=64), HERE, asked)
    assert got == Plan("w4a8", True, "int8 activations, per token and group")


@pytest.mark.parametrize(
    ("wanted", "asked", "words"),
    [
        (request(), Asked(4, "token", None, True, True), "4-bit activations"),
        (request(), Asked(8, "token", None, False, True), "symmetric=False"),
        (request(), Asked(8, "token", None, True, False), "dynamic=False"),
        (request(), Asked(8, "group", 64, True, True), "per group of size 64"),
        (request(), Asked(8, "tensor", None, True, True), "per tensor"),
        (request("uint8b128"), TOKEN, "w8a8: group size (32) not supported"),
        (request("uint7b64", -1), TOKEN, "w8a8: weight type (uint7b64) not supported"),
    ],
)
def test_the_rest_is_kept_with_the_reason(wanted, asked, words):
    got = plan(wanted, HERE, asked)
    assert got.product == activations.kept(wanted)
    assert got.note.startswith("activations are not quantized (nor does upstream on a CPU): ")
    assert words in got.note


@pytest.mark.parametrize(("group_size", "product"), [(16, "w4a16"), (32, "w4a8"), (-1, "w4a8")])
def test_the_opt_in_mode_takes_long_groups(monkeypatch, group_size, product):
    monkeypatch.setenv(envs.INT8_ACTIVATIONS.name, "1")
    got = plan(request(group_size=group_size), HERE, None)
    assert (got.product, got.x_groups) == (product, product == "w4a8")
    assert plan(request("uint8b128", -1), HERE, None) == Plan("w8a16")
