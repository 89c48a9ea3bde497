# SPDX-License-Identifier: Apache-2.0
"""What all linear kernels share, through upstream's own loaders: shards add up to the whole layer,
fused modules are their parts, and processing new values equals a fresh load."""

import pytest
import torch

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

from scheme_cases import activations, create, disk, load, make_scheme, processed

pytestmark = pytest.mark.usefixtures("patched")
N, K = 64, 256

# name -> (scheme, its options, options of the disk tensors)
CASES = {
    **{
        f"w{bits}a16 {'asymmetric' if asymmetric else 'symmetric'}": (
            "WNA16",
            {"bits": bits, "group": 32, "asymmetric": asymmetric},
        )
        for bits in range(2, 9)
        for asymmetric in (False, True)
    },
    "w4a16 channel": ("WNA16", {"bits": 4}),
    "w4a8 packed": ("WNA8Int", {"group": 32, "x_quant": activations()}),
    "w4a8 packed by group": ("WNA8Int", {"group": 32, "x_quant": activations("group", 32)}),
    "w8a8 packed": ("WNA8Int", {"bits": 8, "x_quant": activations()}),
    "w4a8 bytes": ("W4A8Int", {"group": 64}),
    "w4a8 bytes channel": ("W4A8Int", {}),
    "w8a8 dynamic": ("W8A8Int8", {}),
    "w8a8 asymmetric": ("W8A8Int8", {"asymmetric": True}),
}


def data_of(name, options, seed=0):
    bits = options.get("bits", 8 if name == "W8A8Int8" else 4)
    asymmetric = name != "W8A8Int8" and options.get("asymmetric", False)
    dtype = torch.float32 if name == "W8A8Int8" else torch.bfloat16
    return disk(N, K, options.get("group", -1), bits, asymmetric, dtype, seed)


def x_of():
    return torch.randn(5, K, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)


@pytest.mark.parametrize("case", CASES)
def test_output_shards_are_slices_of_the_whole(case, shard):
    """Bit for bit: a row of weights does not depend on its neighbours."""
    name, options = CASES[case]
    data = data_of(name, options)
    whole = processed(name, data, **options)
    pieces = []
    for rank in range(2):
        shard(rank, 2)
        pieces.append(processed(name, data, cut="n", tp=2, **options))
    x = x_of()
    want = whole[0].apply_weights(whole[1], x)
    got = torch.cat([kernel.apply_weights(layer, x) for kernel, layer in pieces], dim=-1)
    assert torch.equal(got, want)


@pytest.mark.parametrize("case", CASES)
def test_input_shards_add_up_to_the_whole(case, shard):
    """float32, so that little is lost in between. Where x is rounded to int8 a shard has scales of
    its own, each value being off by half a step of theirs at most."""
    name, options = CASES[case]
    data = data_of(name, options)
    if name != "W8A8Int8":
        data = type(data)(data.codes, data.scale.float(), data.zeros, data.bias)
    whole = processed(name, data, dtype=torch.float32, **options)
    x = x_of().float()
    total = torch.zeros(5, N)
    for rank, part in enumerate(x.chunk(2, dim=-1)):
        shard(rank, 2)
        kernel, layer = processed(name, data, cut="k", tp=2, dtype=torch.float32, **options)
        total += kernel.apply_weights(layer, part.contiguous())
    want = whole[0].apply_weights(whole[1], x)
    kept = whole[0].note == ""
    assert float((total - want).norm() / want.norm()) < (1e-5 if kept else 0.02)


@pytest.mark.parametrize("case", CASES)
def test_a_fused_layer_is_its_parts(case):
    name, options = CASES[case]
    data = data_of(name, options)
    whole = processed(name, data, **options)
    fused = processed(name, data, parts=(32, 32), **options)
    x = x_of()
    assert torch.equal(
        fused[0].apply_weights(fused[1], x, data.bias.bfloat16()),
        whole[0].apply_weights(whole[1], x, data.bias.bfloat16()),
    )


@pytest.mark.parametrize("case", CASES)
def test_new_values_processed_twice_equal_a_fresh_load(case):
    """As upstream's reload does it: disk tensors anew, processed, copied into the old tensors, so
    that names, shapes and dtypes must stay."""
    name, options = CASES[case]
    kernel, layer = processed(name, data_of(name, options), **options)
    old = dict(layer.named_parameters())
    for seed in (1, 2):
        data = data_of(name, options, seed)
        again = create(make_scheme(name, **options), (N,), K)
        load(again, name, options.get("bits", 8 if name == "W8A8Int8" else 4), data, (N,))
        again.scheme.process_weights_after_loading(again)
        new = dict(again.named_parameters())
        assert {k: (p.shape, p.dtype) for k, p in new.items()} == {
            k: (p.shape, p.dtype) for k, p in old.items()
        }
        for key, param in old.items():
            param.data.copy_(new[key])
        fresh = processed(name, data, **options)
        x = x_of()
        assert torch.equal(kernel.apply_weights(layer, x), fresh[0].apply_weights(fresh[1], x))


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith(("w2", "w3", "w5", "w6"))])
def test_one_graph_serves_every_number_of_rows(case):
    """Upstream compiles the whole model once and drops all guards."""
    name, options = CASES[case]
    kernel, layer = processed(name, data_of(name, options), **options)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: kernel.apply_weights(layer, x), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (2, 7, 33):
            x = torch.randn(rows, K).to(torch.bfloat16)
            assert torch.equal(compiled(x), kernel.apply_weights(layer, x))


@pytest.mark.parametrize("case", CASES)
def test_kernels_keep_no_tensor(case):
    name, options = CASES[case]
    kernel, _ = processed(name, data_of(name, options), **options)
    assert not any(isinstance(value, torch.Tensor) for value in vars(kernel).values())


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_parts_that_share_a_word_of_zero_points_are_refused(bits):
    """Upstream's loader would drop what lies in the shared word."""
    data = disk(40, K, 32, bits, asymmetric=True)
    with pytest.raises(ValueError, match=r"weight_zero_point: .*\(20\) must be a multiple of "):
        processed("WNA16", data, parts=(20, 20), bits=bits, group=32, asymmetric=True)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_shards_that_end_inside_a_word_find_no_kernel(bits, shard):
    shard(0, 2)
    scheme = make_scheme("WNA16", bits=bits)
    with pytest.raises(ValueError, match=r"of a shard of 50 \(25\) must be a multiple of "):
        create(scheme, (N,), 50, cut="k", tp=2)
