# SPDX-License-Identifier: Apache-2.0
"""The gate before the clock: a kernel whose result is wrong is not timed."""

import torch
from torch import Tensor

from vllm_plugin_tm.bench.peers import Peer, Weights
from vllm_plugin_tm.kernels import reference

_ROWS = 4
_CHANNELS = 64
_SMALL_BATCH = 16

# Largest accepted ||y - ref|| / ||ref||. Rounding y to 8 (bf16) or 11 (f16) bits costs 0.3 of a
# unit in the last place on average, and a peer may also round each weight and sum in another order:
# a whole unit is three to four times what a right kernel shows, and a scale that is 1 % off is
# above it. The float32 bound is a thousand roundings.
_BOUND = {
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
    torch.float16: 2 * torch.finfo(torch.float16).eps,
    torch.float32: 1000 * torch.finfo(torch.float32).eps,
}


class WrongResultError(RuntimeError):
    """A kernel computed something else; the message says which, on what, and by how much."""


def check(peer: Peer, weights: Weights, x: Tensor) -> float:
    """Compares the peer's first weight copy, of a small batch the last too, with the reference.

    Some rows of x [M, K] and some output channels at the start, middle and end are compared: the
    tests, not the bench, look at every element.

    Returns:
        The larger ||y - ref|| / ||ref||.

    Raises:
        WrongResultError: it is above the bound of the dtype, or not a number.
    """
    rows = torch.linspace(0, len(x) - 1, min(_ROWS, len(x))).long()
    starts = sorted({0, max(0, weights.n // 2 - _CHANNELS) // 8 * 8, max(0, weights.n - _CHANNELS)})
    parts = [weights.channels(b, min(b + _CHANNELS, weights.n)) for b in starts]
    columns = torch.cat([torch.arange(b, b + p.n) for b, p in zip(starts, parts, strict=True)])
    expected = torch.cat(
        [reference.w4a16_linear(x[rows], p.weight_packed, p.scale, p.zero_point) for p in parts],
        dim=1,
    )
    peer.select()
    worst = 0.0
    # A large batch takes seconds on a slow peer; by then both copies were checked on a small one.
    last = peer.applies[-1:] if len(x) <= _SMALL_BATCH else ()
    for apply in (peer.applies[0], *last):
        got = apply(x)[rows][:, columns].double()
        error = float((got - expected).norm() / expected.norm())
        if not error <= _BOUND[x.dtype]:
            raise WrongResultError(
                f"{peer.label} computes a wrong result: N={weights.n}, K={weights.k}, M={len(x)}, "
                f"{weights.format.name}: relative error {error:.3g}, allowed {_BOUND[x.dtype]:.3g}"
            )
        worst = max(worst, error)
    return worst
