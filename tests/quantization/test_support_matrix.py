# SPDX-License-Identifier: Apache-2.0
"""support_matrix.py: each rule says yes where it should and gives value and limit where not."""

import dataclasses
import itertools

import pytest

from vllm_plugin_tm.quantization.support_matrix import (
    CHANNEL,
    MATRIX,
    Machine,
    Request,
    check,
    markdown,
    needs_zero_points,
    normalize_group_size,
)

HERE = Machine(device="cpu", isa="avx2")
GOOD = Request(
    weight_type="uint4b8",
    zero_points=False,
    group_size=32,
    act_dtype="bfloat16",
    k=4096,
    n=4096,
    full_k=4096,
)


def changed(**fields):
    return dataclasses.replace(GOOD, **fields)


@pytest.mark.parametrize(
    ("row", "weight_type", "group_size", "act_dtype", "isa"),
    [
        cell
        for row in MATRIX
        for cell in itertools.product(
            [row], row.weight_types, (8, 24, 32, 64, 128, CHANNEL), row.act_dtypes, row.isas
        )
    ],
)
def test_every_cell_is_a_yes(row, weight_type, group_size, act_dtype, isa):
    request = changed(
        weight_type=weight_type,
        zero_points=needs_zero_points(weight_type),
        group_size=group_size,
        act_dtype=act_dtype,
        k=384,
        full_k=768,
    )
    verdict = check(request, Machine(device=row.device, isa=isa), (row.scheme,), row.scheme)
    assert verdict.ok, verdict.reason
    assert verdict.reason is None


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (changed(weight_type="uint8b128"), ("uint8b128", "uint4b8")),
        (changed(weight_type="int4"), ("int4", "uint4b8")),
        (changed(weight_type="uint4"), ("uint4", "False")),
        (changed(zero_points=True), ("uint4b8", "True")),
        (changed(act_dtype="int8"), ("int8", "bfloat16")),
        (changed(act_dtype="float8_e4m3fn"), ("float8_e4m3fn", "bfloat16")),
        (changed(act_order=True), ("g_idx",)),
        (changed(group_size=20), ("20", "8", "-1")),
        (changed(group_size=4), ("4", "8")),
        (changed(group_size=-2), ("-2", "8")),
        (changed(group_size=8192), ("4096", "8192")),
        (changed(group_size=48), ("4096", "48")),
        (changed(k=14, full_k=28, group_size=CHANNEL), ("14", "28", "8")),
        (changed(k=0, full_k=0, group_size=CHANNEL), ("0",)),
        (changed(n=0), ("0",)),
    ],
)
def test_every_rule_gives_value_and_limit(request_, words):
    verdict = check(request_, HERE)
    assert not verdict.ok
    assert verdict.reason is not None
    for word in words:
        assert word in verdict.reason


def test_odd_sizes_are_fine_where_nothing_splits_a_word():
    assert check(changed(k=100, full_k=100, n=37, group_size=CHANNEL), HERE).ok
    assert check(changed(k=100, full_k=100, n=37, group_size=100), HERE).ok
    assert check(changed(k=16, full_k=32, group_size=CHANNEL), HERE).ok


def test_processor_without_kernels_is_refused():
    for isa in (None, "none", "sse2"):
        verdict = check(GOOD, Machine(device="cpu", isa=isa))
        assert not verdict.ok
        assert "avx2" in str(verdict.reason)


def test_amx_is_upstreams_unless_an_instruction_set_is_forced():
    assert "AMX" in str(check(GOOD, Machine("cpu", "avx512bf16", amx=True)).reason)
    assert check(GOOD, Machine("cpu", "avx512bf16", amx=True, isa_forced=True)).ok


def test_other_devices_and_excluded_schemes_are_refused():
    assert "cuda" in str(check(GOOD, Machine("cuda", "avx2")).reason)
    assert "w4a16" in str(check(GOOD, HERE, schemes=()).reason)


@pytest.mark.parametrize("group_size", [None, 0, -1, "channel", 512])
def test_channel_has_one_spelling(group_size):
    assert normalize_group_size(group_size, 512) == CHANNEL


@pytest.mark.parametrize("group_size", [32, 64, "128"])
def test_other_group_sizes_stay(group_size):
    assert normalize_group_size(group_size, 512) == int(group_size)


def test_markdown_shows_every_row_whole():
    lines = markdown().splitlines()
    assert len(lines) == 2 + len(MATRIX)
    for row, line in zip(MATRIX, lines[2:], strict=True):
        for word in (row.scheme.upper(), *row.formats, *row.act_dtypes, *row.isas):
            assert word in line


def test_importable_without_torch_and_vllm():
    import subprocess
    import sys

    code = (
        "import sys; from vllm_plugin_tm.quantization import support_matrix; "
        "assert not {'torch', 'vllm'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
