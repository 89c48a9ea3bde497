# SPDX-License-Identifier: Apache-2.0
"""The structs of csrc/cuda's C interface, member by member."""

import ctypes

_POINTERS = ctypes.c_void_p
# turbo::cuda::Scheme
SCHEMES = ("w4a16", "w4a8", "w8a8")


class Layout(ctypes.Structure):
    """turbo::cuda::Layout."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("n", "k", "groups", "bits"))

    def __init__(self, n: int, k: int, groups: int, bits: int = 4) -> None:
        super().__init__(n, k, groups, bits)


class Pack(ctypes.Structure):
    """tm_cuda_pack."""

    _fields_ = (
        ("layout", Layout),
        ("bits", ctypes.c_int64),
        ("scale_bytes", ctypes.c_int64),
        ("gate_up", ctypes.c_int64),
        *((name, _POINTERS) for name in ("codes", "scale", "zero_point")),
        *((name, _POINTERS) for name in ("weight_out", "scale_out", "zero_out", "sums_out")),
    )


class Plan(ctypes.Structure):
    """turbo::cuda::LinearPlan."""

    _fields_ = (
        ("tile", ctypes.c_int),
        ("slices", ctypes.c_int),
        ("slice_slabs", ctypes.c_int),
        ("apart", ctypes.c_bool),
    )


class Linear(ctypes.Structure):
    """turbo::cuda::Linear."""

    _fields_ = (
        ("layout", Layout),
        ("dtype", ctypes.c_int),
        ("rows", ctypes.c_int64),
        ("x", _POINTERS),
        ("x_stride", ctypes.c_int64),
        *((name, _POINTERS) for name in ("weight", "scale", "zero", "bias", "y")),
        ("y_stride", ctypes.c_int64),
        *((name, _POINTERS) for name in ("sums", "arrived")),
    )


class QuantizeX(ctypes.Structure):
    """turbo::cuda::QuantizeX."""

    _fields_ = (
        ("dtype", ctypes.c_int),
        ("rows", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("x", _POINTERS),
        ("x_stride", ctypes.c_int64),
        *((name, _POINTERS) for name in ("given_scale", "given_zero")),
        ("symmetric", ctypes.c_bool),
        *((name, _POINTERS) for name in ("codes", "scale", "zero")),
    )


class LinearA8(ctypes.Structure):
    """turbo::cuda::LinearA8."""

    _fields_ = (
        ("linear", Linear),
        ("scale_type", ctypes.c_int),
        *((name, _POINTERS) for name in ("x_scale", "x_zero", "weight_sum")),
    )


class ExpertWeights(ctypes.Structure):
    """turbo::cuda::ExpertWeights."""

    _fields_ = (
        ("layout", Layout),
        *((name, _POINTERS) for name in ("weight", "scale", "zero", "bias")),
    )


class Activation(ctypes.Structure):
    """turbo::Activation."""

    _fields_ = (
        ("kind", ctypes.c_int),
        *((name, ctypes.c_float) for name in ("alpha", "beta", "limit")),
    )


class Moe(ctypes.Structure):
    """turbo::cuda::Moe."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("scheme", "dtype", "scale_type")),
        *((name, ctypes.c_int64) for name in ("tokens", "top_k", "experts", "known")),
        *((name, ctypes.c_int64) for name in ("hidden", "intermediate")),
        ("x", _POINTERS),
        ("x_stride", ctypes.c_int64),
        ("w13", ExpertWeights),
        ("w2", ExpertWeights),
        ("activation", Activation),
        *((name, _POINTERS) for name in ("topk_weights", "topk_ids")),
        ("wide_ids", ctypes.c_bool),
        *((name, _POINTERS) for name in ("expert_map", "y", "memory")),
    )
