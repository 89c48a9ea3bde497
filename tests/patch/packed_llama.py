# SPDX-License-Identifier: Apache-2.0
"""The tiny Llama of tiny_llama as GPTQ and AWQ have it: the same integers in their order."""

import torch
from awq_words import awq_words
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32


def gptq(bits, group):
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": False,
        "sym": True,
    }


def awq(group, zero_point=True):
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "zero_point": zero_point,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }


def auto_round(bits, group, packing):
    """AutoRound's own configuration around GPTQ's or AWQ's packing."""
    return {
        "quant_method": "auto-round",
        "bits": bits,
        "group_size": group,
        "sym": packing == "gptq",
        "data_type": "int",
        "packing_format": f"auto_round:auto_{packing}",
    }


def codes(packed, k, bits=4, packed_dim=1):
    """Unsigned codes from compressed-tensors' packing."""
    shape = torch.Size((packed.shape[0], k))
    if packed_dim == 0:
        shape = torch.Size((k, packed.shape[1]))
    return unpack_from_int32(packed, bits, shape, packed_dim=packed_dim).int() + (1 << (bits - 1))


def words(values, bits=4):
    """As many unsigned codes of the last dimension as an int32 holds into one, the first in the
    lowest bits."""
    shifts = torch.arange(0, 32, bits)
    wide = (values.reshape(*values.shape[:-1], -1, 32 // bits).long() << shifts).sum(-1)
    return wide.to(torch.int32)


def converted(state, layer_tensors, bits=4):
    """The checkpoint with every quantized layer's tensors replaced by layer_tensors(...)."""
    result = {}
    for name, tensor in state.items():
        base, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            k = int(state[f"{base}.weight_shape"][1])
            zeros = state.get(f"{base}.weight_zero_point")
            new = layer_tensors(codes(tensor, k, bits), state[f"{base}.weight_scale"], zeros, bits)
            result.update({f"{base}.{key}": value.contiguous() for key, value in new.items()})
        elif leaf not in ("weight_scale", "weight_shape", "weight_zero_point"):
            result[name] = tensor
    return result


def gptq_tensors(values, scale, _zeros, bits):
    n, k = values.shape
    groups = scale.shape[1]
    # GPTQ stores the zero point less one: the middle code is 7 in every nibble, 127 in every byte.
    less_one = torch.full((groups, n), (1 << (bits - 1)) - 1)
    return {
        "qweight": words(values, bits).t(),
        "scales": scale.t(),
        "qzeros": words(less_one, bits),
        "g_idx": torch.arange(k, dtype=torch.int32) // (k // groups),
    }


def awq_tensors(values, scale, zeros, _bits):
    n, groups = scale.shape
    zero = torch.full((n, groups), 8) if zeros is None else codes(zeros, n, packed_dim=0)
    return {
        "qweight": awq_words(values.t()),
        "scales": scale.t(),
        "qzeros": awq_words(zero.t()),
    }
