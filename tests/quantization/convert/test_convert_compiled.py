# SPDX-License-Identifier: Apache-2.0
"""The compiled quantizer gives the bits of rounding.py and the words of the compressed-tensors
library, or leaves the work to them."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from vllm_plugin_tm.quantization.convert import compiled
from vllm_plugin_tm.quantization.convert import rounding as r
from vllm_plugin_tm.quantization.convert.rounding import Rounding
from vllm_plugin_tm.quantization.support_matrix import CHANNEL

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
N, K = 37, 640

pytestmark = pytest.mark.skipif(
    not compiled._is_available(), reason="no compiled extension, or no AVX2 to run it"
)


def weights(dtype: torch.dtype) -> torch.Tensor:
    """Rows of ordinary weights, and ones at the edges of what a scale can be."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(N, K, generator=generator) * torch.rand(N, 1, generator=generator)
    w[3] = 0
    w[4] = 1.7  # one value throughout
    w[5, :320] = -0.3
    w[6] = w[6].abs()
    w[7] = -w[7].abs()
    w[8] = (w[8] * 8).round() / 2  # ties
    w[9] *= 1e-38  # scales that are subnormal, or zero in fp16
    w[10] *= 1e4
    w[11] *= 1e-6
    w[12, ::2] = -0.0
    return w.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [8, 32, 40, 128, CHANNEL])
@pytest.mark.parametrize(("method", "symmetric"), [("rtn", True), ("rtn", False), ("signed", True)])
def test_bits_are_those_of_the_definition(dtype, scale_dtype, bits, group, method, symmetric):
    w = weights(dtype)
    rounding = Rounding(bits, group, symmetric, method)
    codes, scale, zero = r.quantize_int(w, rounding, scale_dtype)
    made = compiled.quantize_weights(w, rounding, scale_dtype, packed=False)
    packed = compiled.quantize_weights(w, rounding, scale_dtype, packed=True)
    for found in (made, packed):
        assert found[1].dtype == scale_dtype
        assert torch.equal(found[1], scale)
        assert (found[2] is None) if symmetric else torch.equal(found[2], zero)
    assert torch.equal(made[0], codes)
    assert torch.equal(packed[0], pack_to_int32(codes, bits))


@pytest.mark.parametrize("rows", [1, 2, 3, 64])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_row_does_not_depend_on_its_neighbours(rows, threads):
    w = torch.cat([weights(torch.bfloat16)] * 2)[:rows].contiguous()
    rounding = Rounding(4, 32, symmetric=False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = compiled.quantize_weights(w, rounding, w.dtype, packed=True)
    finally:
        torch.set_num_threads(before)
    alone = [compiled.quantize_weights(row[None], rounding, w.dtype, packed=True) for row in w]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))


def test_columns_apart_in_memory():
    w = weights(torch.bfloat16)[:32].t()
    rounding = Rounding(4, 8)
    made = compiled.quantize_weights(w, rounding, w.dtype, packed=False)
    assert torch.equal(made[0], r.quantize_int(w.contiguous(), rounding, w.dtype)[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("column", [0, 7, 8, 333, K - 1])
def test_the_first_weight_that_is_no_number_is_named(bad, dtype, column):
    w = weights(dtype)
    w[19, column] = w[30, 2] = bad
    with pytest.raises(r.NotFiniteError) as found:
        compiled.quantize_weights(w, Rounding(4, 32), w.dtype, packed=True)
    assert (found.value.row, found.value.column) == (19, column)


@pytest.mark.parametrize(
    "rounding",
    [Rounding(4, 32, method="mse"), Rounding(5, 32), Rounding(4, 20)],
    ids=["a search", "an odd width", "groups that are no multiple of 8"],
)
def test_what_it_does_not_do_is_left(rounding):
    w = weights(torch.bfloat16)
    assert compiled.quantize_weights(w, rounding, w.dtype, packed=True) is None
    assert compiled.quantize_weights(w.double(), Rounding(4, 32), w.dtype, packed=True) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.zeros(4)}, "argument 'weight': expected shape [N, K]"),
        ({"weight": torch.zeros(0, 32)}, "neither 0, given [0, 32]"),
        ({"weight": torch.zeros(32, 4).t()}, "argument 'weight': expected a contiguous tensor"),
        ({"weight": torch.zeros(4, 32, device="meta")}, "'weight': expected a tensor on the CPU"),
        ({"weight": torch.zeros(4, 32).int()}, "argument 'weight': expected dtype BFloat16, Half"),
        ({"bits": 5}, "argument 'bits': expected 4 or 8, given 5"),
        ({"group_size": 12}, "argument 'group_size': expected a multiple of 8 that divides K = 32"),
        ({"group_size": 24}, "given 24"),
        ({"group_size": 0}, "given 0"),
        ({"range": "wide"}, "expected centred, signed or asymmetric, given 'wide'"),
        ({"scale_dtype": torch.int8}, "argument 'scale_dtype': expected dtype BFloat16, Half"),
    ],
)
def test_the_op_names_what_is_wrong(change, words):
    good = {
        "weight": torch.zeros(4, 32),
        "group_size": 8,
        "bits": 4,
        "range": "centred",
        "packed": True,
        "scale_dtype": torch.float32,
    }
    torch.ops.vllm_plugin_tm.quantize_weights(*good.values())
    with pytest.raises(RuntimeError) as raised:
        torch.ops.vllm_plugin_tm.quantize_weights(*(good | change).values())
    assert words in str(raised.value)
