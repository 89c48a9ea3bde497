# SPDX-License-Identifier: Apache-2.0
"""Layers as upstream's compressed-tensors schemes make and load them, from seeded disk tensors, and
what they must compute."""

from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsW4A8Int,
    CompressedTensorsW8A8Int8,
    CompressedTensorsWNA8Int,
    CompressedTensorsWNA16,
)

PREFIX = "model.layers.3.mlp.down_proj"
SCHEMES = ("WNA16", "WNA8Int", "W4A8Int", "W8A8Int8")


def parameter(data, **attributes):
    param = torch.nn.Parameter(data, requires_grad=False)
    for name, value in attributes.items():
        setattr(param, name, value)
    return param


def pack_dense(codes, bits):
    """Signed codes int8 [rows, columns] as int32 words: code i of a row, plus 2**(bits - 1), at bit
    i * bits of the row's stream. Newer compressed-tensors packs so, upstream shapes it so."""
    rows, columns = codes.shape
    count = -(-columns * bits // 32)
    words = torch.zeros(rows, count + 1, dtype=torch.int64)
    for i in range(columns):
        code = (codes[:, i].long() + (1 << (bits - 1))) << (i * bits % 32)
        words[:, i * bits // 32] += code & 0xFFFFFFFF
        words[:, i * bits // 32 + 1] += code >> 32
    return words[:, :count].to(torch.int32)


@dataclass(frozen=True)
class Disk:
    """What a checkpoint has of a layer, before packing: codes int8 [N, K], scale [N, G], zeros int8
    [N, G] or None, bias [N]; of static activations scale [1] and zero point [1]."""

    codes: Tensor
    scale: Tensor
    zeros: Tensor | None
    bias: Tensor
    x_scale: Tensor | None = None
    x_zero: Tensor | None = None

    def rows(self, start, stop):
        """The part of an unfused module."""
        zeros = None if self.zeros is None else self.zeros[start:stop]
        return Disk(self.codes[start:stop], self.scale[start:stop], zeros, self.bias[start:stop])


def disk(n, k, group=-1, bits=4, asymmetric=False, dtype=torch.bfloat16, seed=0):
    """A random layer; scales have both signs, and one of them is zero: legal input."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group == -1 else k // group
    most = 1 << (bits - 1)
    codes = torch.randint(-most, most, (n, k), generator=generator).to(torch.int8)
    scale = torch.randn(n, groups, generator=generator) * 0.8 / most
    scale[n // 2, 0] = 0
    zeros = torch.randint(-most, most, (n, groups), generator=generator).to(torch.int8)
    bias = torch.randn(n, generator=generator).to(dtype)
    return Disk(codes, scale.to(dtype), zeros if asymmetric else None, bias)


def activations(strategy="token", group_size=None, bits=8, **fields):
    """compressed-tensors' arguments of dynamic integer activations."""
    return QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=True,
        dynamic=True,
        strategy=strategy,
        group_size=group_size,
        **fields,
    )


def make_scheme(name, bits=4, group=-1, asymmetric=False, static=False, x_quant=None, channel=True):
    """One of SCHEMES; `asymmetric` is of the weights, save for W8A8Int8, where it is of x."""
    strategy = "channel" if group == -1 else "group"
    size = None if group == -1 else group
    if name == "WNA16":
        return CompressedTensorsWNA16(strategy, bits, size, not asymmetric)
    if name == "WNA8Int":
        return CompressedTensorsWNA8Int(bits, strategy, size, not asymmetric, x_quant)
    if name == "W4A8Int":
        return CompressedTensorsW4A8Int(strategy, 4, size, False, not asymmetric)
    return CompressedTensorsW8A8Int8("channel" if channel else "tensor", static, not asymmetric)


def create(scheme, parts, k, dtype=torch.bfloat16, cut="", tp=1):
    """An unloaded layer of `parts` output sizes, cut along "n" or "k" into `tp` shards."""
    layer = torch.nn.Module()
    layer.prefix = PREFIX
    layer.scheme = scheme
    scheme.create_weights(
        layer=layer,
        output_size=sum(parts),
        input_size=k,
        output_partition_sizes=[part // tp if cut == "n" else part for part in parts],
        input_size_per_partition=k // tp if cut == "k" else k,
        params_dtype=dtype,
        weight_loader=print,
    )
    layer.register_parameter("bias", None)
    return layer


def on_disk(name, bits, data):
    """The tensors of one unfused module in its checkpoint's format, by name."""
    tensors = {"weight_scale": data.scale}
    if name in ("W4A8Int", "W8A8Int8"):
        tensors["weight"] = data.codes
    else:
        tensors["weight_packed"] = pack_dense(data.codes, bits)
        tensors["weight_shape"] = torch.tensor(data.codes.shape)
        if data.zeros is not None:
            tensors["weight_zero_point"] = pack_dense(data.zeros.t(), bits).t().contiguous()
    if data.x_scale is not None:
        tensors["input_scale"] = data.x_scale
    if data.x_zero is not None:
        tensors["input_zero_point"] = data.x_zero
    return tensors


def load(layer, name, bits, data, parts, cut="", tp=1):
    """Loads `data`, cut into modules of `parts`, through upstream's parameter loaders."""
    start = 0
    for index, part in enumerate(parts):
        piece = data.rows(start, start + part) if len(parts) > 1 else data
        for key, tensor in on_disk(name, bits, piece).items():
            param = getattr(layer, key)
            if len(parts) > 1:
                param.load_merged_column_weight(
                    loaded_weight=tensor,
                    shard_id=index,
                    shard_offset=(start // tp if cut == "n" else start),
                    shard_size=(part // tp if cut == "n" else part),
                )
            elif cut == "k":
                param.load_row_parallel_weight(tensor)
            else:
                param.load_column_parallel_weight(tensor)
        start += part


def processed(name, data, parts=None, cut="", tp=1, dtype=torch.bfloat16, **options):
    """The layer ready to run: (kernel, layer)."""
    bits = options.get("bits", 8 if name == "W8A8Int8" else 4)
    scheme = make_scheme(name, **options)
    n, k = data.codes.shape
    parts = parts or (n,)
    layer = create(scheme, parts, k, dtype, cut, tp)
    load(layer, name, bits, data, parts, cut, tp)
    scheme.process_weights_after_loading(layer)
    return scheme.kernel, layer


def assert_close(y, want, allowed):
    """Every element within the oracle's bound; a NaN is outside."""
    assert y.shape == want.shape
    assert bool(((y.double() - want).abs() <= allowed).all())
