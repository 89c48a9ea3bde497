# SPDX-License-Identifier: Apache-2.0
"""peers.py, upstream.py and weights.py with real kernels on small matrices."""

import sys

import pytest
import torch
import zentorch_peer
from bench_formats import FORMATS, SMALL_CACHE, activations, format_name, needs_extension

from vllm_plugin_tm.bench import guard, machine, peers, upstream, weights
from vllm_plugin_tm.bench.cases import DTYPES, Format
from vllm_plugin_tm.bench.peers import Rounding
from vllm_plugin_tm.bench.weights import random_weights
from vllm_plugin_tm.kernels import ops
from vllm_plugin_tm.quantization.support_matrix import CHANNEL

ISAS = ops.cpu_isas() if ops.is_available() else ()
_E4M3 = torch.float8_e4m3fn
BYTE_DOT = any("vnni" in isa for isa in ISAS)


@pytest.mark.parametrize("form", FORMATS, ids=format_name)
def test_torch_peer_is_right_in_every_format(form):
    layer = random_weights(136, 64, form)
    assert guard.check(peers.torch_linear(layer, SMALL_CACHE), activations(layer)) >= 0.0


@needs_extension
@pytest.mark.parametrize("form", FORMATS, ids=format_name)
def test_our_peer_is_right_in_every_format(form):
    layer = random_weights(136, 64, form)
    for isa in ops.cpu_isas():
        assert guard.check(peers.ours(layer, isa, SMALL_CACHE), activations(layer)) >= 0.0


def _upstream_takes(form):
    if form.scheme == "w4a16":
        return form.dtype != "f32"
    return form.scheme == "w8a8" or (form.scheme == "w4a8" and form.symmetric)


def _checked(peer, layer):
    """guard.check. Without a dot of bytes oneDNN adds pairs of products in saturating 16 bits: then
    upstream's W8A8 is wrong by a tenth and more, and the gate must say so."""
    if peer.rounding is Rounding.OWN and peer.lazy and not BYTE_DOT:
        with pytest.raises(guard.WrongResultError, match=r"upstream.* computes a wrong result"):
            guard.check(peer, activations(layer))
        return
    assert guard.check(peer, activations(layer)) >= 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_upstream_rounds_to_e4m3_as_ours_does(dtype):
    pytest.importorskip("vllm")
    layer = random_weights(160, 64, Format(CHANNEL, True, dtype, "fp8-w8a8"))
    with torch.compiler.set_stance("force_eager"):  # compiling takes seconds
        peer = upstream.upstream(layer, SMALL_CACHE)
        assert guard.check(peer, activations(layer)) >= 0.0
    assert peer.rounding is Rounding.CHECKPOINT
    assert peer.lazy
    assert peer.weight_bytes == 160 * 64 + 160 * 4


def test_a_missing_compiler_is_a_reason(monkeypatch):
    pytest.importorskip("vllm")
    from vllm.model_executor.kernels.linear.scaled_mm.pytorch import (
        ChannelWiseTorchFP8ScaledMMLinearKernel,
    )

    def broken(self, layer, x, bias=None):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(ChannelWiseTorchFP8ScaledMMLinearKernel, "apply_weights", broken)
    layer = random_weights(64, 64, Format(CHANNEL, scheme="fp8-w8a8"))
    with pytest.raises(peers.UnavailableError, match=r"cannot be compiled here: .*: no compiler$"):
        upstream.upstream(layer, SMALL_CACHE)


@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_upstreams_amx_kernel_that_would_end_the_process_is_not_run(monkeypatch, dtype):
    pytest.importorskip("vllm")
    if "amx_int8" not in machine.describe(1).flags:
        pytest.skip("upstream's AMX kernel packs weights with AMX only, which is not here")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    layer = random_weights(160, 64, Format(CHANNEL, True, dtype, "w8a8"))
    with pytest.raises(peers.UnavailableError, match=r"AMX kernel takes bf16 only or"):
        upstream.upstream(layer, SMALL_CACHE)


@pytest.mark.parametrize("form", [f for f in FORMATS if _upstream_takes(f)], ids=format_name)
def test_upstream_peer_is_right_in_its_formats(form):
    pytest.importorskip("vllm")
    layer = random_weights(160, 64, form)
    before = torch.get_default_dtype()
    if form.scheme == "w4a16" and "avx512" not in ISAS:
        with pytest.raises(peers.UnavailableError, match=r"W4A16: .* has no cpu_gemm_wna16"):
            upstream.upstream(layer, SMALL_CACHE)
        return
    peer = upstream.upstream(layer, SMALL_CACHE)
    assert torch.get_default_dtype() == before
    _checked(peer, layer)
    assert (peer.rounding is Rounding.OWN) is form.facts.integer_activations
    assert peer.lazy is (form.scheme == "w8a8")


@pytest.mark.parametrize(
    ("form", "n", "message"),
    [
        (Format(32, dtype="f32"), 64, "W4A16 kernel takes bf16 and f16 only"),
        (Format(32), 136, r"W4A16: Output size \(136\) not supported"),
        (Format(32, scheme="w8a16"), 64, r"W8A16: Quant type \(uint8b128\) not supported"),
        (Format(32, False, scheme="w8a16"), 64, r"W8A16: Quant type \(uint8\) not supported"),
        (Format(32, False, scheme="w4a8"), 64, "W4A8 kernel takes symmetric weights only"),
        (Format(32, scheme="fp8-block"), 64, "FP8 BLOCK: of CPUs vLLM has kernels for AMX only"),
        (Format(CHANNEL, scheme="fp8-w8a16"), 64, "FP8 W8A16: vLLM has no such kernel for a CPU"),
        (Format(32, scheme="mxfp4"), 64, "MXFP4: vLLM has no such kernel for a CPU"),
        (Format(16, scheme="nvfp4"), 64, "NVFP4: vLLM has no such kernel for a CPU"),
    ],
)
def test_upstream_peer_says_what_it_does_not_take(form, n, message):
    pytest.importorskip("vllm")
    with pytest.raises(peers.UnavailableError, match=message):
        upstream.upstream(random_weights(n, 64, form), SMALL_CACHE)


def test_upstream_w8a8_stands_beside_w4a8_of_the_same_shape():
    pytest.importorskip("vllm")
    layer = random_weights(160, 64, Format(32, True, "bf16", "w4a8"))
    peer = upstream.upstream_w8a8(layer, SMALL_CACHE)
    assert (peer.name, peer.weights.n, peer.weights.k) == ("upstream-w8a8", 160, 64)
    assert peer.weights.format == Format(CHANNEL, True, "bf16", "w8a8")
    _checked(peer, layer)


def test_a_missing_vllm_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.model_executor.kernels.linear.mixed_precision.cpu", None)
    with pytest.raises(peers.UnavailableError, match="cannot be imported"):
        upstream.upstream(random_weights(64, 64, Format(32)), SMALL_CACHE)


@pytest.mark.parametrize(
    ("form", "codes", "scale", "zero"),
    [
        (Format(32, False), (torch.int32, 136, 8), (torch.bfloat16, 136, 2), (17, 2)),
        (
            Format(32, False, scheme="w8a16"),
            (torch.int32, 136, 16),
            (torch.bfloat16, 136, 2),
            (34, 2),
        ),
        (Format(64, True, "f16", "w4a8"), (torch.int32, 136, 8), (torch.float16, 136, 1), None),
        (
            Format(CHANNEL, False, "bf16", "w8a8"),
            (torch.int8, 136, 64),
            (torch.float32, 136, 1),
            None,
        ),
    ],
    ids=format_name,
)
def test_checkpoint_tensors_of_each_scheme(form, codes, scale, zero):
    layer = random_weights(136, 64, form)
    assert (layer.codes.dtype, *layer.codes.shape) == codes
    assert (layer.scale.dtype, *layer.scale.shape) == scale
    assert (layer.zero_point is None) if zero is None else (layer.zero_point.shape == zero)
    part = layer.channels(8, 24)
    assert torch.equal(part.exact(), layer.exact()[8:24])
    # float32 scales round once more on the way.
    assert torch.allclose(
        layer.dequantized().double(),
        layer.exact(),
        rtol=0.51 * torch.finfo(layer.dtype).eps,
        atol=0,
    )
    twin = layer.symmetric()
    assert twin.format.symmetric
    assert twin.zero_point is None
    # Rows of y as large as rows of x: fp16 must not overflow, nor bf16 lose everything.
    size = (activations(layer).double() @ twin.exact().T).std()
    assert 0.3 < size < 3


@pytest.mark.parametrize(
    ("form", "codes", "scale", "disk_bytes"),
    [
        (Format(CHANNEL, scheme="fp8-w8a8"), (_E4M3, 136, 64), (136, 1), 136 * 64 + 136 * 4),
        (Format(CHANNEL, scheme="fp8-w8a16"), (_E4M3, 136, 64), (136, 1), 136 * 64 + 136 * 4),
        # Five blocks of 32 channels, the last of 8, times two of inputs.
        (Format(32, scheme="fp8-block"), (_E4M3, 136, 64), (136, 2), 136 * 64 + 5 * 2 * 4),
        (Format(32, scheme="mxfp4"), (torch.uint8, 136, 32), (136, 2), 136 * 34),
        (Format(16, scheme="nvfp4"), (torch.uint8, 136, 32), (136, 4), 136 * 36 + 4),
    ],
    ids=format_name,
)
def test_checkpoint_tensors_of_small_floats(form, codes, scale, disk_bytes):
    layer = random_weights(136, 64, form)
    assert (layer.codes.dtype, *layer.codes.shape) == codes
    floats = form.facts.floats
    assert layer.scale.dtype == (torch.float32 if floats.op == "fp8" else torch.uint8)
    assert layer.scale.shape == scale
    assert (layer.channel_scale is not None) is (form.scheme == "nvfp4")
    assert layer.bytes == disk_bytes
    exact = layer.exact()
    assert exact.isfinite().all()
    assert torch.equal(layer.channels(8, 24).exact(), exact[8:24])
    assert torch.equal(layer.dequantized(), exact.to(layer.dtype))
    if floats.block:
        assert len(layer.scale[:32].unique(dim=0)) == 1
        assert len(layer.scale.unique(dim=0)) == 5
    twin = layer.copies(SMALL_CACHE)[-1]
    assert torch.equal(twin.exact(), exact)
    assert twin.codes.data_ptr() != layer.codes.data_ptr()
    size = (activations(layer).double() @ exact.T).std()
    assert 0.3 < size < 3


@needs_extension
@pytest.mark.parametrize(
    ("form", "weight_bytes"),
    [
        (Format(32), 64 * 64 // 2 + 64 * 2 * 2),
        (Format(32, False), 64 * 64 // 2 + 64 * 2 * 2 + 64 * 2 // 2),
        (Format(32, scheme="w8a16"), 64 * 64 + 64 * 2 * 2),
        (Format(32, False, scheme="w8a16"), 64 * 64 + 64 * 2 * 2 + 64 * 2),
        (Format(32, scheme="w4a8"), 64 * 64 // 2 + 64 * 2 * 2),
        (Format(CHANNEL, scheme="w8a8"), 64 * 64 + 64 * 4 + 64 * 4),
        (Format(CHANNEL, scheme="fp8-w8a8"), 64 * 64 + 64 * 4),
        (Format(32, scheme="fp8-block"), 64 * 64 + 64 * 2 * 4),
        (Format(32, scheme="fp8-w8a16"), 64 * 64 + 64 * 2 * 4),
        (Format(32, scheme="mxfp4"), 64 * 64 // 2 + 64 * 2),
        (Format(16, scheme="nvfp4"), 64 * 64 // 2 + 64 * 4 + 64 * 4),
    ],
    ids=format_name,
)
def test_bytes_of_our_layout(form, weight_bytes):
    peer = peers.ours(random_weights(64, 64, form), ops.get_isa(), SMALL_CACHE)
    assert peer.weight_bytes == weight_bytes


@pytest.mark.parametrize("symmetric", [True, False])
def test_bytes_of_upstreams_w8a8(symmetric):
    pytest.importorskip("vllm")
    layer = random_weights(64, 64, Format(CHANNEL, symmetric, "bf16", "w8a8"))
    peer = upstream.upstream(layer, SMALL_CACHE)
    # Codes, scales, and the sums that it keeps for zero points of x.
    assert peer.weight_bytes == 64 * 64 + 64 * 4 + 64 * 4


def test_copies_cover_four_caches():
    assert weights.copies_needed(weight_bytes=10, llc_bytes=100) == 40
    assert weights.copies_needed(weight_bytes=1000, llc_bytes=100) == 2


def test_steps_use_one_copy_after_the_other():
    used = []
    layer = random_weights(64, 64, Format(32))
    peer = peers.Peer("a", "", layer, 1, tuple(lambda x, i=i: used.append(i) for i in range(3)))
    step = peer.step(torch.zeros(1))
    for _ in range(4):
        step()
    assert used == [0, 1, 2, 0]


@pytest.mark.parametrize(("lazy", "warmed"), [(True, [0, 1, 2]), (False, [])])
def test_only_lazy_peers_are_warmed_copy_by_copy(lazy, warmed):
    used = []
    layer = random_weights(64, 64, Format(32))
    applies = tuple(lambda x, i=i: used.append(i) for i in range(3))
    peers.Peer("a", "", layer, 1, applies, lazy=lazy).warm(torch.zeros(1))
    assert used == warmed


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (Format(16, scheme="nvfp4"), "zentorch: NVFP4: vLLM has no zentorch kernel for it"),
        (Format(32, scheme="w8a16"), "zentorch: W8A16: vLLM has no zentorch kernel for it"),
        (Format(32, False, scheme="w4a8"), "zentorch: W4A8: bf16 and no zero points only"),
        (Format(CHANNEL, True, "f32", "w8a8"), "zentorch: W8A8: bf16 and no zero points only"),
    ],
    ids=format_name,
)
def test_zentorch_says_what_it_does_not_take(form, message):
    with pytest.raises(peers.UnavailableError, match=message):
        zentorch_peer._zentorch(random_weights(64, 64, form), SMALL_CACHE)


@pytest.mark.parametrize(
    ("form", "op"),
    [
        (Format(32), "zentorch_woq_repack_weight"),
        (Format(32, scheme="w4a8"), "zentorch_dynamic_qlinear"),
        (Format(CHANNEL, scheme="w8a8"), "zentorch_dynamic_qlinear"),
    ],
    ids=format_name,
)
def test_a_zentorch_without_its_ops_is_a_reason(form, op):
    with pytest.raises(peers.UnavailableError, match=f"this zentorch has no {op}"):
        zentorch_peer._zentorch(random_weights(64, 64, form), SMALL_CACHE)
