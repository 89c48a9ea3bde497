# SPDX-License-Identifier: Apache-2.0
"""The packing ops against the compressed-tensors library: every weight arrives; memory, padding."""

import dataclasses
import subprocess
import sys

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from linear_cases import DTYPES, FLOATS, Layer, make_layer, pack_bits

from vllm_plugin_tm.kernels import reference, reference_float

pytestmark = pytest.mark.usefixtures("extension")

GROUPED = ("w4a16", "w8a16")


def _kernel_bits(mode: str) -> int:
    return 4 if mode == "w4a16" else 8


@st.composite
def _layers(draw: st.DrawFn, mode: str) -> Layer:
    """Any N; K of any number of groups, any length for channel; every width, code and zero point;
    packed or, where the width is the kernel's, one byte each."""
    per_dword = 32 // _kernel_bits(mode)
    bits = draw(st.integers(2, 4) if mode == "w4a16" else st.integers(5, 8))
    n = draw(st.integers(1, 200))
    channel = draw(st.booleans())
    group = per_dword * draw(st.integers(1, 20))
    groups = 1 if channel else draw(st.integers(1, 5))
    k = draw(st.integers(1, 300)) if channel else group * groups
    dtype = draw(st.sampled_from(DTYPES))
    asymmetric = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    most = 2 ** (bits - 1)
    codes = torch.randint(-most, most, (n, k), generator=generator).to(torch.int8)
    zeros = torch.randint(-most, most, (groups, n), generator=generator).to(torch.int8)
    scale = torch.randn(n, groups, generator=generator).to(dtype)
    return Layer(
        mode,
        n,
        k,
        -1 if channel else group,
        codes if draw(st.booleans()) else pack_bits(codes, bits),
        scale,
        pack_bits(zeros, bits).t().contiguous() if asymmetric else None,
        bits=bits,
    )


@pytest.mark.parametrize("mode", GROUPED)
@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_every_weight_arrives(mode: str, data: st.DataObject) -> None:
    """Rows of the identity pick out single weights. With one product per sum nothing is rounded
    but the output, so the result is the dequantized weight, rounded once."""
    layer = data.draw(_layers(mode))
    weight = reference.dequantize(layer.codes, layer.scale, layer.zero_point, layer.k, layer.bits)
    y = layer(torch.eye(layer.k, dtype=layer.scale.dtype))
    assert torch.equal(y, weight.T.to(layer.scale.dtype))


@pytest.mark.parametrize("mode", GROUPED)
@hypothesis.settings(max_examples=50, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_layout_shapes_and_padding(mode: str, data: st.DataObject) -> None:
    """Shapes as the op promises; channels beyond N and weights beyond K are zero in all parts."""
    layer = data.draw(_layers(mode))
    bits = _kernel_bits(mode)
    weight, scale, zero = getattr(torch.ops.vllm_plugin_tm, f"{mode}_pack")(*layer.disk)
    n16, words = -(-layer.n // 16) * 16, -(-layer.k * bits // 32)
    groups = layer.scale.shape[1]
    assert weight.shape == (n16, words)
    assert weight.dtype == torch.int32
    assert scale.shape == (n16, groups)
    assert scale.dtype == layer.scale.dtype
    asymmetric = layer.zero_point is not None
    assert zero.shape == ((n16 * bits // 32, groups) if asymmetric else (0,))
    assert zero.dtype == torch.int32
    # A set of values is the same whatever their order: the rest of each part must be zero bits.
    assert int((scale == 0).sum()) >= (n16 - layer.n) * groups
    codes, zeros = reference.codes_and_zeros(
        layer.codes, layer.scale, layer.zero_point, layer.k, layer.bits
    )
    assert _fields(weight, bits).count_nonzero() == codes.count_nonzero()
    if asymmetric:
        assert _fields(zero, bits).count_nonzero() == zeros.count_nonzero()


def _fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """All fields of `bits` bits of int32 words, unsigned."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (words.unsqueeze(-1) >> shifts) & (2**bits - 1)


@hypothesis.settings(max_examples=50, deadline=None, derandomize=True)
@hypothesis.given(n=st.integers(1, 200), k=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_every_w8a8_weight_arrives(n: int, k: int, seed: int) -> None:
    """Whole numbers up to 127 are their own codes, beside one 127.5 that makes the scale 1: rows of
    the identity pick out single weights. The sums are those of the channels, padding is zero."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (n, k), generator=generator).to(torch.int8)
    layer = Layer("w8a8_static", n, k, -1, codes, torch.ones(n, 1), x_scale=torch.ones(1))
    weight, scale, sums = layer.packed
    n16 = -(-n // 16) * 16
    assert (weight.shape, weight.dtype) == ((n16, -(-k // 4)), torch.int32)
    assert (scale.shape, scale.dtype) == ((n16, 1), torch.float32)
    assert (sums.shape, sums.dtype) == ((n16,), torch.int32)
    assert torch.equal(sums[:n], codes.sum(1, dtype=torch.int32))
    assert not sums[n:].any()
    assert _fields(weight, 8).count_nonzero() == codes.count_nonzero()
    assert torch.equal(layer(torch.eye(k)), codes.t().float())


@pytest.mark.parametrize("gate_up", [False, True])
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.given(
    n=st.integers(1, 100),
    groups=st.integers(1, 5),
    group=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)
def test_every_e4m3_byte_arrives(gate_up: bool, n: int, groups: int, group: int, seed: int) -> None:
    """e4m3 goes the way of 8-bit integers, with float32 scales: rows of the identity pick out
    single weights, bit for bit. Gates and ups take turns by tiles, each padded with zeros."""
    k, rows = 4 * group * groups, n * (1 + gate_up)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 254, (rows, k), generator=generator, dtype=torch.int64)
    bytes_ = torch.where(codes >= 0x7F, codes + 1, codes).to(torch.uint8)  # all but the NaNs
    scale = 2.0 ** torch.randint(-4, 5, (rows, groups), generator=generator)
    weight, packed_scale, zero = torch.ops.vllm_plugin_tm.w8a16_pack(
        bytes_.view(torch.int8), scale, None, k, gate_up=gate_up
    )
    assert (packed_scale.dtype, zero.numel()) == (torch.float32, 0)
    assert _fields(weight, 8).count_nonzero() == bytes_.count_nonzero()
    want = reference_float.dequantize_fp8(bytes_.view(torch.float8_e4m3fn), scale)
    arguments = (weight, packed_scale, None, len(weight), k // groups, "none")
    y = torch.ops.vllm_plugin_tm.fp8_linear(torch.eye(k), *arguments)
    _assert_channels(y, want, gate_up)


@pytest.mark.parametrize("gate_up", [False, True])
@pytest.mark.parametrize("scale_type", ["e8m0", "e4m3"])
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.given(
    n=st.integers(1, 100),
    groups=st.integers(1, 5),
    group=st.integers(1, 10),
    seed=st.integers(0, 2**31),
)
def test_every_e2m1_code_arrives(
    scale_type: str, gate_up: bool, n: int, groups: int, group: int, seed: int
) -> None:
    """e2m1 goes the way of 4-bit integers, which come as code + 8: 0x88888888 turns words of the
    one into words of the other. Scales are bytes that are not looked into."""
    k, rows = 8 * group * groups, n * (1 + gate_up)
    generator = torch.Generator().manual_seed(seed)
    bytes_ = torch.randint(0, 256, (rows, k // 2), generator=generator, dtype=torch.int64)
    bytes_ = bytes_.to(torch.uint8)
    low, high = (120, 135) if scale_type == "e8m0" else (1, 0x7F)
    scale = torch.randint(low, high, (rows, groups), generator=generator, dtype=torch.int64)
    scale = scale.to(torch.uint8)
    words = bytes_.view(torch.int32) ^ -0x77777778  # 0x88888888
    weight, packed_scale, zero = torch.ops.vllm_plugin_tm.w4a16_pack(
        words, scale, None, k, gate_up=gate_up
    )
    assert (packed_scale.dtype, zero.numel()) == (torch.uint8, 0)
    assert packed_scale.count_nonzero() == scale.numel()
    assert (
        _fields(weight, 4).count_nonzero() == _fields(bytes_.view(torch.int32), 4).count_nonzero()
    )
    want = reference_float.dequantize_fp4(bytes_, scale, scale_type)
    arguments = (weight, packed_scale, None, None, len(weight), k // groups, scale_type)
    y = torch.ops.vllm_plugin_tm.fp4_linear(torch.eye(k), *arguments)
    _assert_channels(y, want, gate_up)


def _assert_channels(y: torch.Tensor, weight: torch.Tensor, gate_up: bool) -> None:
    """y [K, channels] has the rows of weight [N, K] in the packed order, and zeros beside them."""
    halves = weight.unflatten(0, (1 + gate_up, -1))
    tiles = torch.nn.functional.pad(halves, (0, 0, 0, -halves.shape[1] % 16)).unflatten(1, (-1, 16))
    assert torch.equal(y.t().double(), tiles.transpose(0, 1).flatten(0, 2))


@pytest.mark.parametrize(("mode", "bits"), [("w4a16", 4), ("w4a16", 3), ("w8a16", 8), ("w8a16", 5)])
def test_packed_and_bytes_are_the_same_weights(mode: str, bits: int) -> None:
    """Codes in words and codes of one byte each give the same kernel tensors, bit for bit."""
    packed = make_layer(mode, 37, 96, 32, torch.bfloat16, asymmetric=True, bits=bits)
    codes = reference.unpack(packed.codes, bits, 96)
    one_byte = dataclasses.replace(packed, codes=codes)
    assert all(map(torch.equal, packed.packed, one_byte.packed))


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_beyond_k_are_ignored(bits: int) -> None:
    """The last word of a row may hold anything where K does not fill it; so may the zero points
    beyond N."""
    layer = make_layer(
        "w4a16" if bits <= 4 else "w8a16", 20, 99, -1, torch.float32, asymmetric=True, bits=bits
    )
    dirty = dataclasses.replace(
        layer, codes=layer.codes.clone(), zero_point=layer.zero_point.clone()
    )
    dirty.codes[:, -1] |= _beyond(99 * bits)
    dirty.zero_point[-1] |= _beyond(20 * bits)
    assert not torch.equal(dirty.codes, layer.codes)
    for clean_part, dirty_part in zip(layer.packed, dirty.packed, strict=True):
        assert torch.equal(clean_part, dirty_part)


def _beyond(used: int) -> int:
    """The bits of a last word that a stream of `used` bits leaves free, as an int32."""
    free = -used % 32
    return -(1 << (32 - free)) if free else 0


def test_packing_does_not_change_its_input() -> None:
    for mode in (*GROUPED, "w8a8", *FLOATS):
        layer = make_layer(mode, 40, 64, 32, torch.bfloat16, asymmetric=True)
        disk = (layer.codes if isinstance(layer, Layer) else layer.weight, layer.scale)
        before = [part.clone() for part in disk]
        assert layer.packed
        assert all(map(torch.equal, disk, before))


@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize(("group", "k"), [(32, 576), (64, 1536), (128, 4096), (-1, 2048)])
@pytest.mark.parametrize("mode", [*GROUPED, "w8a8", "fp8", "fp4_mx", "fp4_nv"])
def test_resident_bytes(mode: str, group: int, k: int, asymmetric: bool) -> None:
    """At most 1.05 of what the checkpoint holds: packed weights, scales and zero points."""
    layer = make_layer(mode, 576, k, group, torch.bfloat16, asymmetric)
    if isinstance(layer, Layer):
        checkpoint = (layer.codes, layer.scale, layer.zero_point)
    else:
        checkpoint = (layer.weight, layer.scale, None)
    disk, kernel = (
        sum(part.nbytes for part in parts if part is not None)
        for parts in (checkpoint, layer.packed)
    )
    assert kernel <= 1.05 * disk


# In a process of its own: a peak is of the whole process and never falls. Unpacked weights, even
# as bytes, would take 64 MiB here; the outputs take 34 to 68 MiB.
_PEAK = """
import resource, torch
from vllm_plugin_tm.kernels import ops
ops.load()
n, k, group = 4096, 16384, 128
def words(*shape):
    return torch.randint(-2**31, 2**31 - 1, shape, dtype=torch.int32)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
bits = {bits}
codes = {codes}
scale = torch.rand(n, k // group).bfloat16()
zero = words(n * bits // 32, k // group)
def pack(rows):
    if "{mode}" == "w8a8":
        return torch.ops.vllm_plugin_tm.w8a8_pack(codes[:rows], torch.ones(rows, 1))
    pack = torch.ops.vllm_plugin_tm.{mode}_pack
    return pack(codes[:rows], scale[:rows], zero[:rows * bits // 32], k, bits)
pack(64)
before = peak()
out = pack(n)
print(peak() - before - sum(part.nbytes for part in out))
"""
_WORDS = "words(n, k * bits // 32)"
_BYTES = "torch.randint(-128, 128, (n, k), dtype=torch.int8)"


@pytest.mark.parametrize(
    ("mode", "bits", "codes"),
    [
        pytest.param("w4a16", 4, _WORDS, id="w4a16-packed"),
        pytest.param("w4a16", 4, _BYTES, id="w4a16-bytes", marks=pytest.mark.slow),
        pytest.param("w8a16", 8, _WORDS, id="w8a16-packed", marks=pytest.mark.slow),
        pytest.param("w8a16", 6, _WORDS, id="w8a16-6-bit", marks=pytest.mark.slow),
        pytest.param("w8a8", 8, _BYTES, id="w8a8"),
    ],
)
def test_peak_memory_while_packing(mode: str, bits: int, codes: str) -> None:
    """Disk order goes straight into the kernel layout: nothing beside the outputs is allocated.
    Allowed are 2 MiB for stacks and the allocator's rounding."""
    program = _PEAK.format(mode=mode, bits=bits, codes=codes)
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= 2 * 2**20
