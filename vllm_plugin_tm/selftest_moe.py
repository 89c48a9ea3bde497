# SPDX-License-Identifier: Apache-2.0
"""Self-tests of the kernels for routed experts: a small layer against plain float64 torch."""

import math

import torch
from torch import Tensor

from vllm_plugin_tm.kernels.reference_moe import Activation, Experts, moe, moe_tolerance

# Ragged in every direction; one token, and enough that an expert has tiles of rows.
_EXPERTS, _HIDDEN, _INTERMEDIATE, _GROUP, _TOP_K = 3, 72, 40, 8, 2
_TOKENS = (1, 50)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ACTIVATIONS = (Activation(), Activation("gelu_tanh_no_mul"))


def worst_case(scheme: str) -> tuple[float, str]:
    """The largest deviation in units of what rounding explains (infinite for NaN), and its case."""
    worst, detail = 0.0, "no case"
    for dtype in _DTYPES:
        for activation in _ACTIVATIONS:
            w13, w2 = _experts(scheme, activation, dtype)
            for tokens in _TOKENS:
                error = _error(scheme, activation, w13, w2, dtype, tokens)
                if not error <= worst:  # also true for NaN
                    worst = error
                    detail = (
                        f"T={tokens} E={_EXPERTS} H={_HIDDEN} I={_INTERMEDIATE} {dtype} "
                        f"{activation.name}"
                    )
    return worst, detail


def _error(
    scheme: str, activation: Activation, w13: Experts, w2: Experts, dtype: torch.dtype, tokens: int
) -> float:
    generator = torch.Generator(device="cpu").manual_seed(tokens)
    x = _normal(generator, tokens, _HIDDEN).to(dtype)
    weights = _normal(generator, tokens, _TOP_K).abs()
    scores = _normal(generator, tokens, _EXPERTS)
    ids = scores.topk(_TOP_K, dim=1).indices.to(torch.int32)
    packed = [
        *_packed(scheme, w13, _HIDDEN, activation.gated),
        *_packed(scheme, w2, _INTERMEDIATE, False),
    ]
    numbers = (activation.name, activation.alpha, activation.beta, activation.limit)
    op = getattr(torch.ops.vllm_plugin_tm, f"{scheme}_moe")
    y = op(x, weights, ids, *packed, _INTERMEDIATE, *numbers, None)
    arguments = (scheme, x, weights, ids, w13, w2, activation)
    ratio = (y.double() - moe(*arguments)).abs() / moe_tolerance(*arguments)
    return math.inf if bool(ratio.isnan().any()) else float(ratio.max())


def _experts(scheme: str, activation: Activation, dtype: torch.dtype) -> tuple[Experts, Experts]:
    generator = torch.Generator(device="cpu").manual_seed(21)
    halves = 2 if activation.gated else 1
    bits = 4 if scheme.startswith("w4") else 8

    def experts(n: int, k: int) -> Experts:
        whole = scheme == "w8a8"
        shape = (_EXPERTS, n, k) if whole else (_EXPERTS, n, k * bits // 32)
        low, high = (-128, 128) if whole else (-(2**31), 2**31)
        codes = torch.randint(
            low, high, shape, generator=generator, device="cpu", dtype=torch.int64
        )
        groups = 1 if whole else k // _GROUP
        # Results of about 1, whatever the width of the codes.
        scale = _normal(generator, _EXPERTS, n, groups) / (2 ** (bits - 2) * k**0.5)
        return Experts(
            codes.to(torch.int8 if whole else torch.int32),
            scale if whole else scale.to(dtype),
            bits=bits,
        )

    return experts(halves * _INTERMEDIATE, _HIDDEN), experts(_HIDDEN, _INTERMEDIATE)


def _packed(scheme: str, experts: Experts, k: int, gate_up: bool) -> tuple[Tensor | None, ...]:
    """Weight, scale, zero point or sums, and bias in the kernel layout, [experts, ...] each."""
    namespace = torch.ops.vllm_plugin_tm
    parts = []
    for codes, scale in zip(experts.codes, experts.scale, strict=True):
        if scheme == "w8a8":
            parts.append(namespace.w8a8_pack(codes, scale, gate_up))
            continue
        pack = namespace.w8a16_pack if scheme == "w8a16" else namespace.w4a16_pack
        parts.append(pack(codes, scale, None, k, experts.bits, gate_up))
    weight, scale, third = (torch.stack(part) for part in zip(*parts, strict=True))
    return weight, scale, third if scheme == "w8a8" else None, None


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    # Device and dtype by name: the model loader sets other defaults around us.
    return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)
