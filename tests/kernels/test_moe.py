# SPDX-License-Identifier: Apache-2.0
"""The ops of routed experts against the float64 oracle: shapes, dtypes, activations, routings."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_cases import (
    DTYPES,
    FLOATS,
    FP4,
    FP8,
    Expected,
    assert_right,
    make_x,
    pairwise,
)
from moe_cases import (
    ACTIVATIONS,
    INTEGER_SCHEMES,
    KEPT_SCHEMES,
    ON_OWN_KERNELS,
    SCHEMES,
    Call,
    MoeLayer,
    Shape,
    make_call,
    make_moe,
    random_routing,
)
from x_views import MATRIX_VIEWS

pytestmark = [pytest.mark.usefixtures("extension"), pytest.mark.slow]

# Hidden, intermediate, group; by the width of weights: one group and several, of one dword and of
# an odd number of them, no whole tiles of channels, channels without whole dwords.
SIZES: dict[int | str, tuple[tuple[int, int, int], ...]] = {
    4: (
        (40, 24, 8),
        (72, 104, 8),
        (72, 24, 24),
        (96, 64, 32),
        (136, 40, 8),
        (136, 272, 136),
        (96, 41, -1),
        (37, 64, -1),
    ),
    8: (
        (40, 24, 4),
        (72, 104, 8),
        (36, 60, 12),
        (96, 64, 32),
        (136, 40, 8),
        (100, 20, 20),
        (97, 41, -1),
        (37, 64, -1),
    ),
    "float4": (  # whole dwords: a checkpoint has whole bytes
        (40, 24, 8),
        (72, 104, 8),
        (72, 24, 24),
        (96, 64, 32),
        (136, 40, 8),
        (136, 272, 136),
        (104, 40, -1),
        (40, 72, -1),
    ),
}
TOKENS = (1, 2, 3, 5, 8, 17, 33, 64, 129)
EXPERTS_AND_TOP_K = (
    (1, 1),
    (3, 1),
    (3, 2),
    (3, 3),
    (5, 1),
    (5, 4),
    (9, 2),
    (9, 3),
    (9, 4),
    (9, 8),
)
ROUTINGS = ("spread", "one", "few", "absent")

AXES: dict[str, Any] = {
    "size": range(8),
    "experts": EXPERTS_AND_TOP_K,
    "tokens": TOKENS,
    "routing": ROUTINGS,
    "view": MATRIX_VIEWS,
    "bias": (False, True),
}
GRID = pairwise(
    mode_and_dtype=[(mode, dtype) for mode in INTEGER_SCHEMES for dtype in DTYPES],
    activation=ACTIVATIONS,
    asymmetric=(False, True),
    scale_dtype=DTYPES,
    **AXES,
)
# The same drivers and activations run weights that are floats: pairs are enough of what is theirs.
GRID += [
    {"mode_and_dtype": (case["mode"], case["dtype"]), **case}
    for case in pairwise(
        mode=FLOATS,
        dtype=DTYPES,
        activation=(*ACTIVATIONS[:2], ACTIVATIONS[-1]),
        long_x_groups=(False, True),
        **{**AXES, "experts": EXPERTS_AND_TOP_K[2::3], "tokens": TOKENS[::2]},
    )
]


def _size(case: dict[str, Any]) -> tuple[int, int, int]:
    mode, _ = case["mode_and_dtype"]
    bits = "float4" if mode in FP4 else 8 if "w8" in mode or mode in FP8 else 4
    return SIZES[bits][case["size"]]


def _name(case: dict[str, Any]) -> str:
    mode, dtype = case["mode_and_dtype"]
    (hidden, intermediate, group), (experts, top_k) = _size(case), case["experts"]
    return (
        f"{mode}-{case['activation'].name}-T{case['tokens']}-E{experts}-top{top_k}-H{hidden}"
        f"-I{intermediate}-g{group}-{str(dtype)[6:]}"
        f"{'-asym' if case.get('asymmetric') else ''}{'-long' if case.get('long_x_groups') else ''}"
        f"{'-bias' if case['bias'] else ''}-{case['routing']}{case['view'].__name__}"
    )


@functools.cache
def _grid_call(index: int) -> Call:
    """Once for all instruction sets, as is what it expects."""
    case = GRID[index]
    (mode, dtype), (hidden, intermediate, group) = case["mode_and_dtype"], _size(case)
    experts, top_k = case["experts"]
    layer = make_moe(
        mode,
        Shape(experts, hidden, intermediate, group),
        dtype,
        case["activation"],
        case.get("asymmetric", False),
        case["bias"],
        scale_dtype=case.get("scale_dtype"),
        long_x_groups=case.get("long_x_groups", False),
    )
    return make_call(layer, case["tokens"], top_k, dtype, case["routing"], case["view"])


def _assert_wrong_scales_are_seen(y: torch.Tensor, call: Call) -> None:
    """1 % more in either product's scales must not pass."""
    for other in (call.expected(w13=1.01), call.expected(w2=1.01)):
        with pytest.raises(AssertionError):
            assert_right(y, other)


@pytest.mark.parametrize(
    ("isa", "index"),
    [
        pytest.param(isa, index, id=f"{isa}-{_name(case)}")
        for index, case in enumerate(GRID)
        for mode, isa in ON_OWN_KERNELS
        if mode == case["mode_and_dtype"][0]
    ],
    indirect=["isa"],
)
def test_against_the_oracle(isa: str, index: int) -> None:
    """Every pair of values of every two axes; and a scale error of 1 % would be seen."""
    call = _grid_call(index)
    before = [t.clone() for t in (call.x, call.topk_weights, call.topk_ids)]
    y = call()
    assert y.dtype == call.x.dtype
    assert_right(y, call.expected())
    assert all(map(torch.equal, (call.x, call.topk_weights, call.topk_ids), before))
    _assert_wrong_scales_are_seen(y, call)


REAL = [
    pytest.param(mode, intermediate, group, asymmetric, id=f"{mode}-g{group}-{asymmetric=}")
    for mode in SCHEMES
    for intermediate, group, asymmetric in (
        [(192, -1, False)]
        if mode == "w8a8"
        else [(192, 32, True), (192, 64, False)]
        if mode in FLOATS
        else [(192, 32, True), (192, 64, False), (256, 128, True), (192, -1, False)]
    )
]


@functools.cache
def _real_call(
    mode: str, intermediate: int, group: int, asymmetric: bool, dtype: torch.dtype
) -> Call:
    shape = Shape(8, 512, intermediate, group)
    layer = make_moe(mode, shape, dtype, asymmetric=asymmetric, bias=asymmetric)
    return make_call(layer, 70, 4, dtype)


@pytest.mark.parametrize(("mode", "intermediate", "group", "asymmetric"), REAL)
def test_real_sizes(isa: str, mode: str, intermediate: int, group: int, asymmetric: bool) -> None:
    """Widths of a small real model."""
    for dtype in DTYPES[:1] if group == 64 else DTYPES[1:] if group == -1 else DTYPES[2:]:
        call = _real_call(mode, intermediate, group, asymmetric, dtype)
        y = call()
        assert_right(y, call.expected())
        _assert_wrong_scales_are_seen(y, call)


@functools.cache
def _small(mode: str, dtype: torch.dtype = torch.bfloat16, tokens: int = 33) -> Call:
    layer = make_moe(mode, Shape(6, 72, 40, 8), dtype, ACTIVATIONS[1], asymmetric=True, bias=True)
    return make_call(layer, tokens, 3, dtype)


@pytest.mark.parametrize("bits", [2, 3, 5, 6, 7])
def test_odd_widths(isa: str, bits: int) -> None:
    """Codes of other widths than the kernel's, gate and up zero points packed across words."""
    for mode in ("w4a16", "w4a8") if bits < 4 else ("w8a16",):
        for activation in (ACTIVATIONS[0], ACTIVATIONS[-1]):
            layer = make_moe(
                mode, Shape(3, 72, 40, 8), torch.float16, activation, True, True, bits=bits
            )
            call = make_call(layer, 9, 2, torch.float16)
            assert_right(call(), call.expected())


@pytest.mark.parametrize("mode", SCHEMES)
def test_no_tokens(isa: str, mode: str) -> None:
    """An empty batch gives an empty result of the right shape."""
    call = _small(mode)
    y = call.layer(call.x[:0], call.topk_weights[:0], call.topk_ids[:0])
    assert y.shape == (0, 72)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("mode", SCHEMES)
def test_no_pairs(isa: str, mode: str, tokens: int) -> None:
    """A rank that has none of the chosen experts adds nothing, and no bias either."""
    call = _small(mode, tokens=tokens)
    torch.full((tokens, 72), float("nan"), dtype=torch.bfloat16)  # freed at once
    y = call.layer(call.x, call.topk_weights, torch.full_like(call.topk_ids, -1))
    assert torch.equal(y, torch.zeros_like(call.x))
    assert not y.signbit().any()


@pytest.mark.parametrize("mode", SCHEMES)
def test_how_ids_and_weights_lie_in_memory_is_no_matter(isa: str, mode: str) -> None:
    """int64 ids, and routings cut out of wider matrices, give the same bits."""
    call = _small(mode)
    want = call()
    wide_ids = torch.full((33, 7), 1000)
    wide_ids[:, 1:4] = call.topk_ids
    wide_weights = torch.full((7, 33), float("nan"))
    wide_weights[1:4] = call.topk_weights.t()
    assert torch.equal(call.layer(call.x, call.topk_weights, call.topk_ids.long()), want)
    assert torch.equal(call.layer(call.x, call.topk_weights, wide_ids[:, 1:4]), want)
    assert torch.equal(call.layer(call.x, wide_weights[1:4].t(), call.topk_ids), want)


@pytest.mark.parametrize("mode", SCHEMES)
def test_rows_may_be_one_and_the_same(isa: str, mode: str) -> None:
    """An expanded x has row stride 0."""
    call = _small(mode)
    x = call.x[:1].expand(33, 72)
    routing = (call.topk_weights, call.topk_ids)
    assert torch.equal(call.layer(x, *routing), call.layer(x.clone(), *routing))


def _part_of(layer: MoeLayer, chosen: list[int]) -> MoeLayer:
    """A rank that holds these experts of the layer, in this order."""

    def pick(weights: Any) -> Any:
        fields = ("codes", "scale", "zero_point", "bias", "channel_scale")
        parts = {name: getattr(weights, name) for name in fields}
        return dataclasses.replace(
            weights, **{name: t if t is None else t[chosen] for name, t in parts.items()}
        )

    expert_map = torch.full((layer.experts,), -1, dtype=torch.int32)
    expert_map[chosen] = torch.arange(len(chosen), dtype=torch.int32)
    return dataclasses.replace(layer, w13=pick(layer.w13), w2=pick(layer.w2), expert_map=expert_map)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", SCHEMES)
def test_an_expert_map_leaves_the_others_out(isa: str, mode: str, dtype: torch.dtype) -> None:
    """Experts that are elsewhere are as weights of zero and as ids of -1, to the bit."""
    call = _small(mode, dtype)
    chosen = [1, 4, 5]
    elsewhere = ~torch.isin(call.topk_ids, torch.tensor(chosen))
    assert elsewhere.any(dim=1).any()
    part = _part_of(call.layer, chosen)
    y = part(call.x, call.topk_weights, call.topk_ids)
    zeroed = call.layer(call.x, call.topk_weights.masked_fill(elsewhere, 0), call.topk_ids)
    dropped = call.layer(call.x, call.topk_weights, call.topk_ids.masked_fill(elsewhere, -1))
    assert torch.equal(y, zeroed)
    assert torch.equal(y, dropped)
    local = call.topk_ids.masked_fill(elsewhere, -1).long()
    local = torch.where(local < 0, -1, part.expert_map[local])  # as a caller maps them
    mapped = dataclasses.replace(part, expert_map=None)(call.x, call.topk_weights, local)
    assert torch.equal(y, mapped)
    right = dataclasses.replace(call, layer=part, _cache={}).expected()
    assert_right(y, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", SCHEMES)
def test_two_ranks_together(isa: str, mode: str, dtype: torch.dtype) -> None:
    """Expert parallelism: what two ranks hold, in any order, adds up to the whole layer."""
    call = _small(mode, dtype)
    parts = [
        dataclasses.replace(call, layer=_part_of(call.layer, chosen), _cache={})
        for chosen in ([0, 2, 4], [5, 3, 1])
    ]
    total = sum(part().double() for part in parts)
    allowed = sum(part.expected().allowed for part in parts)
    assert_right(total, Expected(call.expected().y, allowed))
    with pytest.raises(AssertionError):
        assert_right(total, Expected(call.expected(w2=1.01).y, allowed))


@pytest.mark.parametrize("mode", SCHEMES)
def test_one_expert_for_all_tokens(isa: str, mode: str) -> None:
    """Many rows for one expert, none for the others."""
    call = _small(mode)
    for expert in (0, 5):
        ids = torch.full((33, 1), expert, dtype=torch.int32)
        weights = call.topk_weights[:, :1].contiguous()
        one = Call(call.layer, call.x, weights, ids)
        assert_right(one(), one.expected())


@pytest.mark.parametrize("mode", SCHEMES)
def test_an_expert_twice_for_one_token(isa: str, mode: str) -> None:
    """Both weights count."""
    call = _small(mode)
    ids = call.topk_ids.clone()
    ids[::2, 2] = ids[::2, 0]
    twice = dataclasses.replace(call, topk_ids=ids, _cache={})
    assert_right(twice(), twice.expected())


@pytest.mark.parametrize("mode", SCHEMES)
def test_weights_of_any_sign(isa: str, mode: str) -> None:
    """Weights are factors: zero, negative and large ones too."""
    call = _small(mode, torch.float32)
    weights = call.topk_weights * torch.tensor([-1.0, 0.0, 1000.0])
    other = dataclasses.replace(call, topk_weights=weights, _cache={})
    assert_right(other(), other.expected())


@pytest.mark.parametrize("mode", SCHEMES)
def test_every_element_of_the_output_is_written(isa: str, mode: str) -> None:
    """Memory that torch hands out again still holds NaN: the op must leave none of it."""
    for tokens in (1, 3, 33, 129):
        call = _small(mode, tokens=tokens)
        want = call()
        assert want.isfinite().all()
        for _ in range(3):
            torch.full((tokens, 72), float("nan"), dtype=torch.bfloat16)  # freed at once
            assert torch.equal(call(), want)


# csrc/cpu/moe.h: kMoeScratchBytes. What lies between the products of all pairs alone, one value of
# 2 bytes (where it will be rounded: 4) for each pair and channel, takes more here: the call must
# cut tokens.
SCRATCH_BYTES = 64 * 2**20
MANY_TOKENS, MANY_EXPERTS, MANY_TOP_K, MANY_INTERMEDIATE = 2500, 3, 32, 512


@functools.cache
def _many_tokens(mode: str) -> Call:
    """Cheap in arithmetic: hidden is as small as can be, and the experts are chosen repeatedly."""
    layer = make_moe(mode, Shape(MANY_EXPERTS, 8, MANY_INTERMEDIATE, -1), torch.bfloat16)
    generator = torch.Generator().manual_seed(5)
    pairs = (MANY_TOKENS, MANY_TOP_K)
    ids = torch.randint(0, MANY_EXPERTS, pairs, generator=generator, dtype=torch.int32)
    weights, _ = random_routing(MANY_TOKENS, MANY_TOP_K, MANY_TOP_K)
    return Call(layer, make_x(MANY_TOKENS, 8, torch.bfloat16), weights, ids)


@pytest.mark.parametrize("mode", SCHEMES)
def test_more_tokens_than_scratch_memory_holds(isa: str, mode: str) -> None:
    """Cut somewhere inside or between two calls: the same bits."""
    call = _many_tokens(mode)
    size = 2 if mode in KEPT_SCHEMES else 4
    assert call.topk_ids.numel() * MANY_INTERMEDIATE * size > SCRATCH_BYTES
    y = call()
    arguments = (call.x, call.topk_weights, call.topk_ids)
    halves = [
        call.layer(*(t[part] for t in arguments)) for part in (slice(1111), slice(1111, None))
    ]
    assert torch.equal(y, torch.cat(halves))
    assert y.isfinite().all()


# In a process of its own, because a peak is of the whole process and never falls; one that imports
# little, because that takes longer than the calls.
_PEAK = """
import resource, sys, torch
from vllm_plugin_tm.kernels import ops
ops.load()
op, arguments = torch.load(sys.argv[1], weights_only=False)
moe = getattr(torch.ops.vllm_plugin_tm, op)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
moe(**arguments | {name: arguments[name][:1] for name in ("x", "topk_weights", "topk_ids")})
before = peak()
y = moe(**arguments)
print(peak() - before - y.nbytes)
"""


@pytest.mark.parametrize("mode", FP8)
def test_scales_of_channels_beside_those_of_bytes(isa: str, mode: str) -> None:
    """Powers of two may stand on either side, for each channel and expert: the same bits. Scales of
    one group are packed in the order of channels."""
    layer = make_moe(mode, Shape(6, 72, 40, -1), torch.bfloat16, ACTIVATIONS[1], bias=True)
    call = make_call(layer, 33, 3, torch.bfloat16)
    arguments = call.layer.arguments(call.x, call.topk_weights, call.topk_ids)
    generator = torch.Generator().manual_seed(4)
    for name in ("w13", "w2"):
        scale = arguments[f"{name}_scale"]
        factor = 2.0 ** torch.randint(-3, 4, scale.shape[:2], generator=generator)
        arguments[f"{name}_channel_scale"] = factor
        arguments[f"{name}_scale"] = scale / factor.unsqueeze(-1)
    assert torch.equal(call.layer.moe(**arguments), call())


@pytest.mark.parametrize("mode", ["w4a16", pytest.param("w8a8", marks=pytest.mark.slow)])
def test_scratch_memory_is_bounded(tmp_path: Path, mode: str) -> None:
    """One call of many tokens needs no more than the header says. Allowed beside it are 2 MiB for
    stacks and the allocator's rounding, and the sorted pairs: id, token and weight of each."""
    call = _many_tokens(mode)
    arguments = call.layer.arguments(call.x, call.topk_weights, call.topk_ids)
    torch.save((f"{call.layer.op}_moe", arguments), tmp_path / "call.pt")
    command = [sys.executable, "-c", _PEAK, tmp_path / "call.pt"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= SCRATCH_BYTES + 2 * 2**20 + 12 * MANY_TOKENS * MANY_TOP_K
