# SPDX-License-Identifier: Apache-2.0
"""The gate before the clock: a kernel whose result is wrong is not timed."""

import math

import torch
from torch import Tensor

from vllm_plugin_tm.bench.peers import Peer, Rounding
from vllm_plugin_tm.bench.weights import Weights
from vllm_plugin_tm.kernels import reference_float, reference_int8

_ROWS = 4
_CHANNELS = 64
SMALL_BATCH = 16
"""Up to so many rows the last weight copy is checked too."""

# Largest accepted ||y - ref|| / ||ref||. Rounding y to 8 (bf16) or 11 (f16) bits costs 0.3 of a
# unit in the last place on average, and a peer may also round each weight and sum in another order:
# a whole unit is three to four times what a right kernel shows, and a scale that is 1 % off is
# above it. The float32 bound is a thousand roundings.
BOUND = {
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
    torch.float16: 2 * torch.finfo(torch.float16).eps,
    torch.float32: 1000 * torch.finfo(torch.float32).eps,
}

# A peer that rounds x to integers in its own way (upstream divides by 127, not by 127.5) has other
# codes than ours, so it is compared with the product of x as it is and may be off by what rounding
# costs. Its steps are at most max|x| / 127 of a row, an error of step / sqrt(12) on average; a
# quarter more leaves room for few rows and few channels, and codes of 7 bits are above it.
_LARGEST_CODE = 127
ROUNDING_ROOM = 1.25


class WrongResultError(RuntimeError):
    """A kernel computed something else; the message says which, on what, and by how much."""


def check(peer: Peer, x: Tensor) -> float:
    """Compares the peer's first weight copy, of a small batch the last too, with the reference.

    Some rows of x [M, K] and some output channels at the start, middle and end are compared: the
    tests, not the bench, look at every element.

    Returns:
        The larger ||y - ref|| / ||ref||.

    Raises:
        WrongResultError: it is above the bound of the dtype and of the peer's rounding of x, or not
            a number.
    """
    weights = peer.weights
    rows = torch.linspace(0, len(x) - 1, min(_ROWS, len(x))).long()
    starts = sorted({0, max(0, weights.n // 2 - _CHANNELS) // 8 * 8, max(0, weights.n - _CHANNELS)})
    parts = [weights.channels(b, min(b + _CHANNELS, weights.n)) for b in starts]
    columns = torch.cat([torch.arange(b, b + p.n) for b, p in zip(starts, parts, strict=True)])
    expected = torch.cat([_expected(x[rows], part, peer.rounding) for part in parts], dim=1)
    bound = _bound(x[rows], peer.rounding)
    peer.select()
    what = f"N={weights.n}, K={weights.k}, M={len(x)}, {weights.format.name}"
    worst = 0.0
    # A large batch takes seconds on a slow peer; by then both copies were checked on a small one.
    last = peer.applies[-1:] if len(x) <= SMALL_BATCH else ()
    for apply in (peer.applies[0], *last):
        got = apply(x)[rows][:, columns].double()
        worst = max(worst, compare(peer.label, what, got, expected, bound))
    return worst


def compare(label: str, what: str, got: Tensor, expected: Tensor, bound: float) -> float:
    """||got - expected|| / ||expected||, both float64, of the kernel `label` on the case `what`.

    Raises:
        WrongResultError: it is above the bound, or not a number.
    """
    error = float((got - expected).norm() / expected.norm())
    if not error <= bound:
        raise WrongResultError(
            f"{label} computes a wrong result: {what}: relative error {error:.3g}, "
            f"allowed {bound:.3g}"
        )
    return error


def _expected(x: Tensor, weights: Weights, rounding: Rounding) -> Tensor:
    """The float64 result that the peer's should be near."""
    if rounding is not Rounding.CHECKPOINT:
        return x.double() @ weights.exact().T
    codes, scale, form = weights.codes, weights.scale, weights.format
    if form.facts.floats:
        return reference_float.fp8_linear(x, codes, scale, None, form.facts.floats.x_rounding)
    if form.facts.grouped:
        return reference_int8.w4a8_linear(x, codes, scale, weights.zero_point)
    return reference_int8.w8a8_linear(x, codes, scale, x_symmetric=form.symmetric)


def _bound(x: Tensor, rounding: Rounding) -> float:
    bound = BOUND[x.dtype]
    if rounding is not Rounding.OWN:
        return bound
    values = x.double()
    steps = values.abs().amax(1) / _LARGEST_CODE
    noise = float((x.shape[1] / 12) ** 0.5 * steps.norm() / values.norm())
    # The two errors have nothing to do with each other: their squares add up.
    return math.hypot(bound, ROUNDING_ROOM * noise)
