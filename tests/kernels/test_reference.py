# SPDX-License-Identifier: Apache-2.0
"""The oracle itself: against the compressed-tensors library's dequantization, and its bounds."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from vllm_plugin_tm.kernels import reference


@pytest.mark.parametrize("asymmetric", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize(("group", "k"), [(32, 96), (128, 256), (-1, 100)])
def test_dequantization_is_the_librarys(group: int, k: int, asymmetric: bool) -> None:
    """Exactly: the library computes in float32, where these products are exact too."""
    n, groups = 24, 1 if group == -1 else k // group
    generator = torch.Generator().manual_seed(0)
    # Powers of two, so that the library's own rounding, in the scale's dtype, is none.
    scale = 2.0 ** torch.randint(-4, 4, (n, groups), generator=generator)
    zeros = torch.randint(-8, 8, (n, groups), generator=generator, dtype=torch.int8)
    codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    disk = {
        "weight_packed": pack_to_int32(codes, 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor([n, k]),
    }
    if asymmetric:
        disk["weight_zero_point"] = pack_to_int32(zeros, 4, packed_dim=0).contiguous()
    arguments = QuantizationArgs(
        num_bits=4,
        symmetric=not asymmetric,
        strategy="channel" if group == -1 else "group",
        group_size=None if group == -1 else group,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    library = compressor.decompress(dict(disk), scheme)["weight"]
    ours = reference.dequantize_w4(disk["weight_packed"], scale, disk.get("weight_zero_point"), k)
    assert torch.equal(ours, library.double())


def test_bounds_hold_for_float32_and_refuse_one_percent() -> None:
    """torch's float32 product is inside of the bound, one with scales 1 % off is far outside."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 1024, generator=generator)
    codes = torch.randint(-(2**31), 2**31 - 1, (64, 128), generator=generator).int()
    scale = torch.randn(64, 8, generator=generator)
    weight = reference.dequantize_w4(codes, scale, None, 1024)
    want = reference.w4a16_linear(x, codes, scale)
    allowed = reference.w4a16_tolerance(x, codes, scale)
    assert torch.equal(want, x.double() @ weight.T)
    assert (((x @ weight.float().T).double() - want).abs() <= allowed).all()
    assert ((1.01 * want - want).abs() > allowed).double().mean() > 0.95


@pytest.mark.parametrize(
    ("codes", "scale", "zero", "k", "name"),
    [
        ((4, 8), (4, 3), None, 64, "scale"),
        ((4, 8), (4,), None, 64, "scale"),
        ((4, 7), (4, 2), None, 64, "weight_packed"),
        ((5, 8), (4, 2), None, 64, "weight_packed"),
        ((4, 8), (4, 2), (4, 2), 64, "zero_point"),
    ],
)
def test_shapes_that_do_not_belong_together(
    codes: tuple[int, ...],
    scale: tuple[int, ...],
    zero: tuple[int, ...] | None,
    k: int,
    name: str,
) -> None:
    """A wrong shape is named, with what was expected and what was given."""
    with pytest.raises(ValueError, match=rf"{name}: expected .*, got \["):
        reference.dequantize_w4(
            torch.zeros(codes, dtype=torch.int32),
            torch.ones(scale),
            None if zero is None else torch.zeros(zero, dtype=torch.int32),
            k,
        )
