# SPDX-License-Identifier: Apache-2.0
"""The same activations in every way that memory can hold them; what lies beside them is NaN."""

import torch
from torch import Tensor


def _nan(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def _contiguous(x: Tensor) -> Tensor:
    return x


def _row_stride(x: Tensor) -> Tensor:
    """Rows with NaN before and after them: what lies between rows is not read as data."""
    wide = _nan(x.shape[0] + 2, x.shape[1] + 13, dtype=x.dtype)
    wide[1:-1, 5:-8] = x
    return wide[1:-1, 5:-8]


def _unaligned(x: Tensor) -> Tensor:
    """Contiguous, but one element after an aligned address."""
    flat = _nan(x.numel() + 2, dtype=x.dtype)
    flat[1:-1] = x.flatten()
    return flat[1:-1].view(x.shape)


def _transposed(x: Tensor) -> Tensor:
    """Inner stride of M instead of 1."""
    return x.t().contiguous().t()


def _every_second(x: Tensor) -> Tensor:
    """Inner stride of 2 with NaN between the elements."""
    wide = _nan(x.shape[0], 2 * x.shape[1], dtype=x.dtype)
    wide[:, ::2] = x
    return wide[:, ::2]


def _three_dims(x: Tensor) -> Tensor:
    return x.view(1, *x.shape)


def _three_dims_strided(x: Tensor) -> Tensor:
    """[batch, 1, K] cut out of [batch, 2, K], the other half NaN."""
    wide = _nan(x.shape[0], 2, x.shape[1], dtype=x.dtype)
    wide[:, :1] = x.unsqueeze(1)
    return wide[:, :1]


MATRIX_VIEWS = (_contiguous, _row_stride, _unaligned, _transposed, _every_second)
VIEWS = (*MATRIX_VIEWS, _three_dims, _three_dims_strided)
