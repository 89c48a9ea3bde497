# SPDX-License-Identifier: Apache-2.0
"""w4a16_pack against the compressed-tensors library: every weight arrives; memory, padding."""

import subprocess
import sys

import hypothesis
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import strategies as st
from w4a16_cases import DTYPES, Layer, make_layer

from vllm_plugin_tm.kernels import reference

pytestmark = pytest.mark.usefixtures("extension")


@st.composite
def _layers(draw: st.DrawFn) -> Layer:
    """Any N; K of any number of groups, any length for channel; every code and zero point."""
    n = draw(st.integers(1, 200))
    channel = draw(st.booleans())
    group = 8 * draw(st.integers(1, 20))
    groups = 1 if channel else draw(st.integers(1, 5))
    k = draw(st.integers(1, 300)) if channel else group * groups
    dtype = draw(st.sampled_from(DTYPES))
    asymmetric = draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    zeros = torch.randint(-8, 8, (n, groups), generator=generator, dtype=torch.int8)
    scale = torch.randn(n, groups, generator=generator).to(dtype)
    return Layer(
        n,
        k,
        -1 if channel else group,
        pack_to_int32(codes, 4),
        scale,
        pack_to_int32(zeros, 4, packed_dim=0).contiguous() if asymmetric else None,
        None,
    )


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(layer=_layers())
def test_every_weight_arrives(layer: Layer) -> None:
    """Rows of the identity pick out single weights. With one product per sum nothing is rounded
    but the output, so the result is the library's dequantized weight, rounded once."""
    weight = reference.dequantize_w4(*layer.disk, layer.k)
    y = layer(torch.eye(layer.k, dtype=layer.scale.dtype))
    assert torch.equal(y, weight.T.to(layer.scale.dtype))


@hypothesis.settings(max_examples=50, deadline=None, derandomize=True)
@hypothesis.given(layer=_layers())
def test_layout_shapes_and_padding(layer: Layer) -> None:
    """Shapes as the op promises; channels beyond N and weights beyond K are zero in all parts."""
    weight, scale, zero = torch.ops.vllm_plugin_tm.w4a16_pack(*layer.disk, layer.k)
    n16, words = -(-layer.n // 16) * 16, -(-layer.k // 8)
    groups = layer.scale.shape[1]
    assert weight.shape == (n16, words)
    assert weight.dtype == torch.int32
    assert scale.shape == (n16, groups)
    assert scale.dtype == layer.scale.dtype
    assert zero.shape == ((n16 // 8, groups) if layer.zero_point is not None else (0,))
    assert zero.dtype == torch.int32
    # A set of values is the same whatever their order: the rest of each part must be zero bits.
    assert int((scale == 0).sum()) >= (n16 - layer.n) * groups
    nonzero = _nibbles(weight).count_nonzero()
    signed = _nibbles(layer.codes)[:, : layer.k] != 8
    assert nonzero == signed.count_nonzero()
    if layer.zero_point is not None:
        zeros = _nibbles(layer.zero_point.t().contiguous())[:, : layer.n] != 8
        assert _nibbles(zero).count_nonzero() == zeros.count_nonzero()


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """[rows, columns] int32 as [rows, 8 * columns] unsigned nibbles."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & 15).flatten(1)


def test_codes_beyond_k_are_ignored() -> None:
    """The last word of a row may hold anything where K does not fill it; so may the zero points
    beyond N."""
    layer = make_layer(20, 100, -1, torch.float32, asymmetric=True)
    dirty = Layer(
        20,
        100,
        -1,
        layer.codes.clone(),
        layer.scale,
        layer.zero_point.clone(),
        None,
    )
    dirty.codes[:, -1] |= 0x5A5A0000
    dirty.zero_point[-1] |= 0x5A5A0000
    for clean_part, dirty_part in zip(layer.packed, dirty.packed, strict=True):
        assert torch.equal(clean_part, dirty_part)


def test_packing_does_not_change_its_input() -> None:
    layer = make_layer(40, 64, 32, torch.bfloat16, asymmetric=True)
    before = [part.clone() for part in layer.disk]
    assert layer.packed
    assert all(torch.equal(part, other) for part, other in zip(layer.disk, before, strict=True))


@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize(("group", "k"), [(32, 576), (64, 1536), (128, 4096), (-1, 2048)])
def test_resident_bytes(group: int, k: int, asymmetric: bool) -> None:
    """At most 1.05 of what the checkpoint holds: packed weights, scales and zero points."""
    layer = make_layer(576, k, group, torch.bfloat16, asymmetric)
    disk, kernel = (
        sum(part.nbytes for part in parts if part is not None)
        for parts in (layer.disk, layer.packed)
    )
    assert kernel <= 1.05 * disk


# In a process of its own: a peak is of the whole process and never falls. Unpacked weights, even
# as bytes, would take 64 MiB here; the outputs take 34 MiB.
_PEAK = """
import resource, torch
from vllm_plugin_tm.kernels import ops
ops.load()
n, k, group = 4096, 16384, 128
codes = torch.randint(-2**31, 2**31 - 1, (n, k // 8), dtype=torch.int32)
scale = torch.rand(n, k // group).bfloat16()
zero = torch.randint(-2**31, 2**31 - 1, (n // 8, k // group), dtype=torch.int32)
torch.ops.vllm_plugin_tm.w4a16_pack(codes[:64], scale[:64], zero[:8], k)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = torch.ops.vllm_plugin_tm.w4a16_pack(codes, scale, zero, k)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 - sum(part.nbytes for part in out))
"""


def test_peak_memory_while_packing() -> None:
    """Disk order goes straight into the kernel layout: nothing beside the outputs is allocated.
    Allowed are 2 MiB for stacks and the allocator's rounding."""
    run = subprocess.run(
        [sys.executable, "-c", _PEAK], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= 2 * 2**20
