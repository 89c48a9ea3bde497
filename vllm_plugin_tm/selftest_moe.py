# SPDX-License-Identifier: Apache-2.0
"""Self-tests of the kernels for routed experts: a small layer against plain float64 torch."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_plugin_tm import machine, selftest
from vllm_plugin_tm.kernels import ops
from vllm_plugin_tm.kernels.reference_moe import Activation, Experts, moe, moe_tolerance
from vllm_plugin_tm.selftest import there

# Ragged in every direction; one token, and enough that an expert has tiles of rows.
_EXPERTS, _TOP_K = 3, 2
_TOKENS = (1, 50)
_ACTIVATIONS = (Activation(), Activation("gelu_tanh_no_mul"))
# What the ops of floats take beside the rest: roundings of activations, kinds of scales.
_KINDS = {"fp8": ("none", "token", "group", "tensor"), "fp4": ("e8m0", "e4m3")}
_X_SCALE = 0.018


@dataclass(frozen=True)
class _Sizes:
    hidden: int
    intermediate: int
    group: int


# Groups of a GPU's kernels are longer.
_SIZES = {"cpu": _Sizes(72, 40, 8), "cuda": _Sizes(96, 96, 32)}


def _sizes() -> _Sizes:
    return _SIZES[machine.device()]


def worst_case(scheme: str) -> tuple[float, str]:
    """The largest deviation in units of what rounding explains (infinite for NaN), and its case."""
    worst, detail = 0.0, "no case"
    for dtype in selftest.dtypes():
        for activation in _ACTIVATIONS:
            w13, w2 = _experts(scheme, activation, dtype)
            for kind in _KINDS.get(scheme, ("",)):
                for tokens in _TOKENS:
                    error = _error(scheme, kind, activation, w13, w2, dtype, tokens)
                    if not error <= worst:  # also true for NaN
                        worst = error
                        detail = (
                            f"T={tokens} E={_EXPERTS} {_sizes()} {dtype} "
                            f"{activation.name} {kind}".rstrip()
                        )
    return worst, detail


def _error(
    scheme: str,
    kind: str,
    activation: Activation,
    w13: Experts,
    w2: Experts,
    dtype: torch.dtype,
    tokens: int,
) -> float:
    generator = torch.Generator(device="cpu").manual_seed(tokens)
    sizes = _sizes()
    x = _normal(generator, tokens, sizes.hidden).to(dtype)
    weights = _normal(generator, tokens, _TOP_K).abs()
    scores = _normal(generator, tokens, _EXPERTS)
    ids = scores.topk(_TOP_K, dim=1).indices.to(torch.int32)
    more: tuple[object, ...] = ()
    named: dict[str, object] = {}
    if scheme == "fp8":
        static = None
        if kind == "tensor":
            static = torch.tensor([_X_SCALE], device="cpu", dtype=torch.float32)
        w13, w2 = replace(w13, x_scale=static), replace(w2, x_scale=static)
        more, named = (kind, static, static, -1), {"x_rounding": kind}
    elif scheme == "fp4":
        w13, w2 = replace(w13, scale_type=kind), replace(w2, scale_type=kind)
        more = (kind,)
    packed = [
        *_packed(scheme, w13, sizes.hidden, activation.gated),
        *_packed(scheme, w2, sizes.intermediate, False),
    ]
    numbers = (activation.name, activation.alpha, activation.beta, activation.limit)
    op = getattr(torch.ops.vllm_plugin_tm, f"{scheme}_moe")
    routing = (there(x), there(weights), there(ids))
    y = op(*routing, *packed, sizes.intermediate, *numbers, None, *more)
    arguments = (scheme, x, weights, ids, w13, w2, activation)
    want, allowed = moe(*arguments, **named), moe_tolerance(*arguments, **named)  # type: ignore[arg-type]
    ratio = (y.cpu().double() - want).abs() / allowed
    return math.inf if bool(ratio.isnan().any()) else float(ratio.max())


def _experts(scheme: str, activation: Activation, dtype: torch.dtype) -> tuple[Experts, Experts]:
    generator = torch.Generator(device="cpu").manual_seed(21)
    halves = 2 if activation.gated else 1
    bits = 4 if scheme.startswith("w4") else 8
    sizes = _sizes()

    def floats(n: int, k: int) -> Experts:
        def numbers(low: int, high: int, *shape: int) -> Tensor:
            made = torch.randint(
                low, high, shape, generator=generator, device="cpu", dtype=torch.int64
            )
            return made.to(torch.uint8)

        groups = k // sizes.group
        if scheme == "fp8":
            codes = numbers(0, 0x7F, _EXPERTS, n, k) | numbers(0, 2, _EXPERTS, n, k) << 7
            scale = _normal(generator, _EXPERTS, n, groups) / (110 * k**0.5)
            return Experts(codes.view(torch.float8_e4m3fn), scale)
        # One range of bytes for both kinds: 2**-3 to 2**-1, and 320 to 416.
        return Experts(
            numbers(0, 256, _EXPERTS, n, k // 2),
            numbers(0x7C, 0x7F, _EXPERTS, n, groups),
            channel_scale=_normal(generator, _EXPERTS, n) / (1000 * k**0.5),
        )

    def experts(n: int, k: int) -> Experts:
        if scheme in _KINDS:
            return floats(n, k)
        whole = scheme == "w8a8"
        shape = (_EXPERTS, n, k) if whole else (_EXPERTS, n, k * bits // 32)
        low, high = (-128, 128) if whole else (-(2**31), 2**31)
        codes = torch.randint(
            low, high, shape, generator=generator, device="cpu", dtype=torch.int64
        )
        groups = 1 if whole else k // sizes.group
        # Results of about 1, whatever the width of the codes.
        scale = _normal(generator, _EXPERTS, n, groups) / (2 ** (bits - 2) * k**0.5)
        return Experts(
            codes.to(torch.int8 if whole else torch.int32),
            scale if whole else scale.to(dtype),
            bits=bits,
        )

    return experts(halves * sizes.intermediate, sizes.hidden), experts(
        sizes.hidden, sizes.intermediate
    )


def _packed(scheme: str, experts: Experts, k: int, gate_up: bool) -> tuple[Tensor | None, ...]:
    """Weight, scale, zero point or sums, and bias in the kernel layout, [experts, ...] each."""
    namespace = torch.ops.vllm_plugin_tm
    parts = []
    for codes, scale in zip(experts.codes, experts.scale, strict=True):
        if scheme == "fp8":
            parts.append(namespace.w8a16_pack(codes.view(torch.int8), scale, None, k, 8, gate_up))
            continue
        if scheme == "fp4":
            words = codes.view(torch.int32) ^ -0x77777778  # see small_floats.e2m1_words
            parts.append(namespace.w4a16_pack(words, scale, None, k, 4, gate_up))
            continue
        if scheme == "w8a8":
            parts.append(namespace.w8a8_pack(there(codes), there(scale), gate_up))
            continue
        pack = namespace.w8a16_pack if scheme == "w8a16" else namespace.w4a16_pack
        parts.append(pack(there(codes), there(scale), None, k, experts.bits, gate_up))
    weight, scale, third = (torch.stack(part) for part in zip(*parts, strict=True))
    if experts.channel_scale is not None:
        return weight, scale, _in_tiles(experts.channel_scale, gate_up), None
    return weight, scale, third if scheme == "w8a8" else None, None


def _in_tiles(values: Tensor, gate_up: bool) -> Tensor:
    """[E, N] in the order of packed channels: tiles of 16 gates and of 16 ups alternate."""
    halves = values.unflatten(1, (2 if gate_up else 1, -1))
    count = halves.shape[2]
    halves = torch.nn.functional.pad(halves, (0, ops.padded(count) - count))
    return halves.unflatten(2, (-1, ops.TILE_N)).transpose(1, 2).flatten(1).contiguous()


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    # Device and dtype by name: the model loader sets other defaults around us.
    return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)
