# SPDX-License-Identifier: Apache-2.0
"""The live registries with the patches applied: which combinations are ours, and no others."""

import itertools

import pytest
import torch

from vllm_plugin_tm import envs
from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

from vllm.model_executor.kernels import linear
from vllm.model_executor.layers.quantization.utils import quant_utils
from vllm.platforms import PlatformEnum
from vllm.scalar_type import scalar_types
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_plugin_tm.patch import apply
from vllm_plugin_tm.quantization import support_matrix
from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_w4a4_fp4 import (
    TMMxFp4LinearKernel,
)
from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_fp8 import (
    TMFp8LinearKernel,
)
from vllm_plugin_tm.quantization.support_matrix import CHANNEL, MATRIX, WEIGHT_TYPES

TYPES = {str(value): value for value in vars(scalar_types).values() if not callable(value)}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# What mixed-precision kernels are asked for; int8 and floats have lists of their own.
MIXED = sorted(name for name, kind in WEIGHT_TYPES.items() if name != "int8" and not kind.floats)
FP8_KINDS = {
    # Weights and activations that share a scale.
    "whole": (quant_utils.kFp8StaticTensorSym, quant_utils.kFp8StaticTensorSym),
    "channel": (quant_utils.kFp8StaticChannelSym, quant_utils.kFp8DynamicTokenSym),
    "block": (quant_utils.kFp8Static128BlockSym, quant_utils.kFp8Dynamic128Sym),
}


@pytest.fixture(autouse=True)
def _patched():
    apply.apply()
    yield
    apply.remove()


def of_type(weight_type, group=32, dtype=torch.bfloat16, k=1024):
    return linear.MPLinearLayerConfig(
        full_weight_shape=(k, 256),
        partition_weight_shape=(k, 256),
        weight_type=TYPES[weight_type],
        act_type=dtype,
        group_size=group,
        zero_points=weight_type in WEIGHT_TYPES and WEIGHT_TYPES[weight_type].zero_points,
    )


def ours(config):
    """Names of our mixed-precision kernels that take the layer, in the order of the live list."""
    kernels = linear._POSSIBLE_KERNELS[PlatformEnum.CPU]
    mine = [kernel for kernel in kernels if kernel.__module__.startswith("vllm_plugin_tm.")]
    return [kernel.__name__ for kernel in mine if kernel.can_implement(config)[0]]


def test_upstream_knows_every_weight_type_by_our_name():
    assert set(MIXED) <= set(TYPES)


@pytest.mark.parametrize("weight_type", sorted(TYPES))
@pytest.mark.parametrize("group", [32, 64, 128, CHANNEL])
@pytest.mark.parametrize("dtype", FLOATS)
def test_each_weight_type_has_the_one_kernel_that_is_meant_for_it(weight_type, group, dtype):
    packed = {name for name, kind in WEIGHT_TYPES.items() if kind.packed}
    expected = {"int4": "TMW4A8IntLinearKernel"} | dict.fromkeys(packed, "TMWNA16LinearKernel")
    names = [expected[weight_type]] if weight_type in expected else []
    assert ours(of_type(weight_type, group, dtype)) == names


@pytest.mark.parametrize("weight_type", MIXED)
def test_only_multiples_of_a_word_of_the_layout_are_group_sizes(weight_type):
    word = 4 if WEIGHT_TYPES[weight_type].bits > 4 else 8
    taken = {g for g in range(1, 65) if ours(of_type(weight_type, g, k=g * 16))}
    assert taken == set(range(word, 65, word))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_other_activations_are_nobodys(dtype):
    for weight_type in MIXED:
        assert ours(of_type(weight_type, dtype=dtype)) == []


@pytest.mark.parametrize(
    ("channel", "static", "symmetric"), list(itertools.product([True, False], repeat=3))
)
def test_every_int8_layer_is_ours_and_upstreams_without(channel, static, symmetric):
    kernel = linear.init_int8_linear_kernel(channel, static, symmetric, "test")
    assert type(kernel).__name__ == "TMInt8ScaledMMLinearKernel"
    apply.remove()
    kernel = linear.init_int8_linear_kernel(channel, static, symmetric, "test")
    assert type(kernel).__module__.startswith("vllm.")


@pytest.mark.parametrize("weight_type", MIXED)
def test_off_upstream_chooses_or_refuses_as_ever(weight_type):
    def chosen():
        try:
            return linear.choose_mp_linear_kernel(of_type(weight_type)).__module__
        except ValueError:
            return "refused"

    assert chosen().startswith("vllm_plugin_tm.")
    apply.remove()
    upstreams = {"int4": "vllm.", "uint4": "vllm.", "uint4b8": "vllm."}
    assert chosen().startswith(upstreams.get(weight_type, "refused"))


@pytest.mark.parametrize("scheme", envs.SCHEMES)
def test_a_scheme_left_out_leaves_its_layers_to_upstream(monkeypatch, scheme):
    others = tuple(name for name in envs.SCHEMES if name != scheme)
    monkeypatch.setenv(envs.TAKEN_SCHEMES.name, ",".join(others))
    for weight_type in MIXED:
        taken = bool(ours(of_type(weight_type)))
        assert taken == (support_matrix.scheme_of(weight_type) != scheme)
    int8 = type(linear.init_int8_linear_kernel(True, False, True, "test")).__name__
    assert int8.startswith("TM") == (scheme != "w8a8")
    assert TMFp8LinearKernel.is_supported()[0] == (scheme != "fp8")
    assert TMMxFp4LinearKernel.is_supported()[0] == (scheme != "fp4")


@pytest.mark.parametrize("dtype", FLOATS)
def test_where_upstream_has_kernels_for_amx_the_layers_are_ours(monkeypatch, dtype):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    for weight_type in MIXED:
        chosen = linear.choose_mp_linear_kernel(of_type(weight_type, dtype=dtype))
        assert chosen.__module__.startswith("vllm_plugin_tm.")
    with set_default_torch_dtype(dtype):  # as while vLLM builds a model
        int8 = type(linear.init_int8_linear_kernel(True, False, True, "test")).__name__
        assert int8 == "TMInt8ScaledMMLinearKernel"
        for weights, activations in FP8_KINDS.values():
            kernel = linear.init_fp8_linear_kernel(activations, weights, dtype, dtype, (256, 256))
            assert isinstance(kernel, TMFp8LinearKernel)


def test_every_scheme_has_every_instruction_set():
    assert {row.scheme for row in MATRIX} == set(envs.SCHEMES)
    assert all(row.isas == envs.ISAS for row in MATRIX if row.device == "cpu")
