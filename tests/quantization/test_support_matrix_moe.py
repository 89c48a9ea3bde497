# SPDX-License-Identifier: Apache-2.0
"""MOE_MATRIX and check_moe: every cell is a yes, each rule gives value and limit where not."""

import dataclasses
import itertools

import pytest

from vllm_plugin_tm import envs
from vllm_plugin_tm.quantization.support_matrix import (
    CHANNEL,
    MOE_ACTIVATIONS,
    MOE_MATRIX,
    WEIGHT_TYPES,
    Machine,
    MoeRequest,
    check_moe,
    markdown,
    needs_zero_points,
    whole_words,
)

HERE = Machine(device="cpu", isa="avx2")
GOOD = MoeRequest(
    scheme="w4a16",
    weight_type="uint4b8",
    zero_points=False,
    group_size=32,
    act_dtype="bfloat16",
    hidden=384,
    intermediate=768,
    full_intermediate=768,
    activation="silu",
)
CELLS = [
    pytest.param(r, t, id=f"{r.device}-{r.scheme}-{t}") for r in MOE_MATRIX for t in r.weight_types
]
CPU_CELLS = [cell for cell in CELLS if cell.values[0].device == "cpu"]
PACKED_CELLS = [cell for cell in CPU_CELLS if WEIGHT_TYPES[cell.values[1]].packed]


def changed(**fields):
    return dataclasses.replace(GOOD, **fields)


def request(row, weight_type, **fields):
    """Experts of this cell of the matrix; channel-wise where it knows no groups."""
    values = {
        "scheme": row.scheme,
        "weight_type": weight_type,
        "zero_points": needs_zero_points(weight_type),
        "group_size": 32 if row.group_multiple else CHANNEL,
    }
    return changed(**(values | fields))


@pytest.mark.parametrize(("row", "weight_type"), CELLS)
def test_every_cell_is_a_yes(row, weight_type):
    sizes = (8, 24, 32, 64, 128, CHANNEL) if row.device == "cpu" else (32, 64, 128, CHANNEL)
    groups = sizes if row.group_multiple else (CHANNEL,)
    for group, dtype, isa in itertools.product(groups, row.act_dtypes, row.isas):
        wanted = request(
            row, weight_type, group_size=group, act_dtype=dtype, full_intermediate=1536
        )
        verdict = check_moe(wanted, Machine(row.device, isa), (row.scheme,))
        assert verdict.ok, (group, dtype, isa, verdict.reason)
        assert verdict.reason is None
    for activation in MOE_ACTIVATIONS:
        wanted = request(row, weight_type, activation=activation)
        assert check_moe(wanted, Machine(row.device, row.isas[0])).ok


@pytest.mark.parametrize(("row", "weight_type"), CELLS)
def test_rules_of_the_machine_and_of_the_user(row, weight_type):
    wanted = request(row, weight_type)
    others = tuple(scheme for scheme in envs.SCHEMES if scheme != row.scheme)
    reason = str(check_moe(wanted, Machine(row.device, row.isas[0]), others).reason)
    assert reason == f"{row.scheme} is not among the schemes to take {others}"
    for isa in (None, "sse2"):
        reason = str(check_moe(wanted, Machine(row.device, isa)).reason)
        assert reason == f"instruction set ({isa}) not supported, supported are {row.isas}"
    devices = sorted(r.device for r in MOE_MATRIX if r.scheme == row.scheme)
    reason = str(check_moe(wanted, Machine("xpu", None)).reason)
    assert reason == f"no {row.scheme} kernel for device xpu, only for {devices}"


@pytest.mark.parametrize(("row", "weight_type"), CPU_CELLS)
@pytest.mark.parametrize("act_dtype", ["bfloat16", "float16", "float32"])
def test_amx_takes_every_scheme_in_every_dtype(row, weight_type, act_dtype):
    wanted = request(row, weight_type, act_dtype=act_dtype)
    assert check_moe(wanted, Machine("cpu", "amx")).ok


@pytest.mark.parametrize(("row", "weight_type"), CELLS)
@pytest.mark.parametrize("group_size", [1, 2, 4, 12, 20, 36, -2])
def test_group_sizes_are_multiples_of_a_word_of_the_layout(row, weight_type, group_size):
    wanted = request(
        row,
        weight_type,
        group_size=group_size,
        hidden=720,
        intermediate=1440,
        full_intermediate=1440,
    )
    verdict = check_moe(wanted, Machine(row.device, row.isas[0]))
    multiple = row.group_multiple
    assert verdict.ok == bool(multiple and group_size > 0 and group_size % multiple == 0)
    if not verdict.ok:
        limits = (f"multiples of {multiple}", f"and {CHANNEL}") if multiple else (f"is {CHANNEL}",)
        reason = str(verdict.reason)
        assert reason.startswith(f"w13: group size ({group_size}) not supported")
        assert all(limit in reason for limit in limits)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (changed(scheme="w2a16"), ("no w2a16 kernel",)),
        (changed(weight_type="uint8b128"), ("w13", "uint8b128", "uint4b8")),
        (changed(scheme="w8a8", weight_type="uint8b128"), ("w13", "uint8b128", "int8")),
        (changed(weight_type="float4_e2m1f"), ("float4_e2m1f", "uint4b8")),
        (changed(weight_type="uint4"), ("w13", "uint4", "(False)", "(True)")),
        (changed(zero_points=True), ("w13", "uint4b8", "(True)", "(False)")),
        (changed(act_dtype="float8_e4m3fn"), ("float8_e4m3fn", "bfloat16")),
        (changed(activation="relu2"), ("activation (relu2)", *MOE_ACTIVATIONS)),
        (changed(activation="SiLU"), ("activation (SiLU)",)),
        (changed(hidden=0), ("w13", "input size 0", "empty")),
        (changed(intermediate=0), ("w13", "output size 0", "empty")),
        # The first product's input, then the second's, must consist of groups.
        (changed(group_size=256), ("w13: input size (384)", "(256)")),
        (changed(group_size=128, intermediate=320), ("w2: input size (320)", "(128)")),
        # A shard of the second product's input ends inside a word.
        (
            changed(group_size=CHANNEL, intermediate=12, full_intermediate=24),
            ("w2: the input size of a shard of 24 (12) must be a multiple of 8",),
        ),
    ],
)
def test_every_rule_gives_value_and_limit(request_, words):
    verdict = check_moe(request_, HERE)
    assert not verdict.ok
    for word in words:
        assert word in str(verdict.reason)


@pytest.mark.parametrize(("row", "weight_type"), PACKED_CELLS)
def test_shards_and_halves_end_with_a_word(row, weight_type):
    """Weights are cut along the second product's input; zero points of gates stop where those of
    ups start, also where nothing is cut."""
    kind = WEIGHT_TYPES[weight_type]
    whole = whole_words(kind.bits)
    for inner in range(1, 97):
        cut = request(
            row,
            weight_type,
            group_size=CHANNEL,
            intermediate=inner,
            full_intermediate=2 * inner,
        )
        assert check_moe(cut, HERE).ok == (inner % whole == 0)
        verdict = check_moe(dataclasses.replace(cut, full_intermediate=inner), HERE)
        assert verdict.ok == (inner % whole == 0 or not kind.zero_points)
        if not verdict.ok:
            reason = str(verdict.reason)
            assert reason.startswith(f"w13: the output size of a shard of {2 * inner} ({inner})")
            assert f"multiple of {whole}:" in reason


@pytest.mark.parametrize(("scheme", "weight_type"), [("w4a8", "int4"), ("w8a8", "int8")])
def test_bytes_can_be_cut_anywhere(scheme, weight_type):
    fields = {"hidden": 13, "intermediate": 7, "full_intermediate": 14, "group_size": CHANNEL}
    assert check_moe(changed(scheme=scheme, weight_type=weight_type, **fields), HERE).ok


def test_the_hidden_size_is_not_cut():
    """Zero points of the second product may end inside a word at the end of the tensor."""
    for hidden in (36, 37, 100):
        wanted = changed(weight_type="uint4", zero_points=True, group_size=CHANNEL, hidden=hidden)
        assert check_moe(wanted, HERE).ok


def test_markdown_shows_every_row_whole():
    lines = markdown(MOE_MATRIX).splitlines()
    assert len(lines) == 2 + len(MOE_MATRIX)
    for row, line in zip(MOE_MATRIX, lines[2:], strict=True):
        for word in (row.scheme.upper(), *row.formats, *row.act_dtypes, row.rounding, *row.isas):
            assert word in line
    schemes = ["W4A16", "W8A16", "W4A8", "W8A8", "FP8", "FP4", "W4A16", "W4A8", "W8A8"]
    assert [line.split(" |")[0] for line in lines[2:]] == [f"| {scheme}" for scheme in schemes]
    assert "2, 3 and 4 bits, symmetric and asymmetric" in lines[2]
    assert "5, 6, 7 and 8 bits, symmetric and asymmetric" in lines[3]
    assert "8 bits, symmetric |" in lines[5]
    assert "channel; one scale" in lines[5]
