# SPDX-License-Identifier: Apache-2.0
"""Our methods for routed experts of compressed-tensors checkpoints against the oracle: formats,
activations, biases, expert parallelism, router weights, int8 activations on demand."""

import pytest
import torch

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

from experts_cases import (
    EXPERTS,
    FORMATS,
    HIDDEN,
    INTERMEDIATE,
    SOME,
    Format,
    assert_right,
    make_method,
    moe_config,
    processed,
)

from vllm_plugin_tm import envs, layer_table
from vllm_plugin_tm.kernels.reference_moe import Activation
from vllm_plugin_tm.quantization.experts_kernel import TMExpertsKernel

pytestmark = [pytest.mark.usefixtures("patched"), pytest.mark.slow]

W4A16 = Format("WNA16", 4, 32)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_right_product(form, dtype):
    case = processed(form, config=moe_config(dtype))
    assert isinstance(case.kernel, TMExpertsKernel)
    assert case.kernel.request.scheme == form.scheme
    assert case.kernel.group_size == form.group
    kept = form.method == "WNA16"
    assert case.kernel.note == ("" if kept else "int8 activations, per token")
    assert_right(case, dtype)


@pytest.mark.parametrize("tokens", [1, 70])
@pytest.mark.parametrize("form", SOME, ids=str)
def test_one_token_and_many(form, tokens):
    assert_right(processed(form), tokens=tokens)


@pytest.mark.parametrize("form", SOME, ids=str)
def test_no_token(form):
    case = processed(form)
    x = torch.empty(0, HIDDEN, dtype=torch.bfloat16)
    y = case.method.apply(
        case.layer, x, torch.empty(0, 2), torch.empty(0, 2, dtype=torch.int32), None, None
    )
    assert (y.shape, y.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("form", SOME, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_biases(form, dtype):
    """Gates' and ups' are told apart, and each expert has its own."""
    case = processed(form, config=moe_config(dtype, has_bias=True))
    assert case.w13.bias is not None
    assert case.w2.bias is not None
    assert_right(case, dtype)


@pytest.mark.parametrize(
    ("name", "fields", "activation"),
    [
        ("silu", {"swiglu_limit": 0.75}, Activation("swiglu", limit=0.75)),
        ("swigluoai", {}, Activation("swiglu", 1.702, 1.0, 7.0)),
        (
            "swigluoai_uninterleave",
            {"swiglu_alpha": 1.5, "swiglu_beta": 0.5, "swiglu_limit": 0.75},
            Activation("swiglu", 1.5, 0.5, 0.75),
        ),
        ("swigluoai_uninterleave", {}, Activation("swiglu", 1.0, 0.0)),
        ("swiglustep", {}, Activation("swiglustep", limit=7.0)),
        (
            "situ",
            {"activation_situ_beta": 0.7, "activation_situ_linear_beta": 0.9},
            Activation("situ", 0.7, 0.9),
        ),
        ("situ", {"activation_situ_beta": 0.7}, Activation("situ", 0.7)),
        ("gelu", {}, Activation("gelu")),
        ("gelu_tanh", {}, Activation("gelu_tanh")),
    ],
)
def test_activations(name, fields, activation):
    # float32, so that no rounding hides the difference of two functions that are nearly alike.
    config = moe_config(torch.float32, name, **fields)
    assert_right(processed(W4A16, config=config, activation=activation), torch.float32)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu2"])
@pytest.mark.parametrize("form", [W4A16, Format("WNA16", 8, 32, True), FORMATS[-1]], ids=str)
def test_activations_without_gates(form, name):
    config = moe_config(torch.float32, f"{name}_no_mul", has_bias=True)
    case = processed(form, config=config, activation=Activation(f"{name}_no_mul"))
    assert case.w13.scale.shape[1] == INTERMEDIATE
    assert_right(case, torch.float32)


@pytest.mark.parametrize("form", SOME, ids=str)
def test_expert_parallel(form):
    """Five of eight experts are here, not in the order of their numbers."""
    here = torch.tensor([-1, 3, 0, -1, 4, 1, -1, 2], dtype=torch.int32)
    config = moe_config(num_experts=8, num_logical_experts=8)
    case = processed(form, config=config, expert_map=here)
    assert case.layer.global_num_experts == 8
    assert case.w13.codes.shape[0] == EXPERTS
    assert_right(case, tokens=20)


@pytest.mark.parametrize("form", SOME, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_router_weights_on_the_input(form, dtype):
    config = moe_config(dtype, experts_per_token=1)
    case = processed(form, config=config, apply_router_weight_on_input=True)
    assert_right(case, dtype, top_k=1)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_int8_activations_on_demand(monkeypatch, bits, group, asymmetric):
    """Packed weights of up to 4 bits run as w4a8, by groups, and the layer table says so."""
    monkeypatch.setenv(envs.INT8_ACTIVATIONS.name, "1")
    case = processed(Format("WNA16", bits, group, asymmetric))
    assert case.kernel.request.scheme == "w4a8"
    root = torch.nn.Module()
    root.experts = case.layer
    (row,) = layer_table.collect(root)
    assert (row.on_tm, row.kernel, row.group_size) == (True, "TMExpertsKernel", group)
    assert row.note.startswith("int8 activations, per token and group")
    assert_right(case, x_groups=True, scheme="w4a8")


@pytest.mark.parametrize("form", [Format("WNA16", 4, 16), Format("WNA16", 8, 32)], ids=str)
def test_short_groups_and_wide_weights_keep_activations(monkeypatch, form):
    monkeypatch.setenv(envs.INT8_ACTIVATIONS.name, "1")
    case = processed(form)
    assert (case.kernel.request.scheme, case.kernel.note) == (form.scheme, "")
    assert_right(case)


def test_experts_that_quantize_activations_already_are_not_changed_by_it(monkeypatch):
    monkeypatch.setenv(envs.INT8_ACTIVATIONS.name, "1")
    case = processed(Format("W4A8Int8", 4, 32))
    assert case.kernel.note == "int8 activations, per token"
    assert_right(case)


def test_a_shard_of_experts_is_known_as_one():
    """Each rank of two has half of the intermediate size."""
    config = moe_config(tp=2)
    kernel = make_method(W4A16, config).kernel
    assert (kernel.request.intermediate, kernel.request.full_intermediate) == (
        INTERMEDIATE,
        2 * INTERMEDIATE,
    )
    assert_right(processed(W4A16, config=config))
