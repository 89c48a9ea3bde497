# SPDX-License-Identifier: Apache-2.0
"""AWQ's order of 4-bit codes in 32-bit words, for tests that write such checkpoints."""

import torch
from torch import Tensor

ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
"""Which column of eight lies at each nibble, from the lowest."""


def words(codes: Tensor) -> Tensor:
    """Eight unsigned codes of the last dimension into one int32, the first in the lowest bits."""
    shifts = torch.arange(0, 32, 4)
    return (codes.reshape(*codes.shape[:-1], -1, 8).long() << shifts).sum(-1).to(torch.int32)


def awq_words(codes: Tensor) -> Tensor:
    """The same in AWQ's order."""
    return words(codes.reshape(*codes.shape[:-1], -1, 8)[..., ORDER].flatten(-2))
