# SPDX-License-Identifier: Apache-2.0
"""support_matrix.py: each rule says yes where it should and gives value and limit where not."""

import dataclasses
import itertools

import pytest

from vllm_plugin_tm import envs
from vllm_plugin_tm.quantization.support_matrix import (
    CHANNEL,
    MATRIX,
    WEIGHT_TYPES,
    Machine,
    Request,
    check,
    check_machine,
    markdown,
    needs_zero_points,
    normalize_group_size,
    scheme_of,
    split_problem,
    whole_words,
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


def request(weight_type, **fields):
    """A layer with this type of weights; channel-wise where it knows no groups."""
    values = {"weight_type": weight_type, "zero_points": needs_zero_points(weight_type)}
    return changed(**(values | fields))


@pytest.mark.parametrize(
    ("row", "weight_type"),
    [pytest.param(r, t, id=f"{r.device}-{r.scheme}-{t}") for r in MATRIX for t in r.weight_types],
)
def test_every_cell_is_a_yes(row, weight_type):
    sizes = (8, 24, 32, 64, 128, CHANNEL) if row.device == "cpu" else (32, 64, 128, CHANNEL)
    groups = sizes if row.group_multiple else (CHANNEL,)
    for group_size, act_dtype, isa in itertools.product(groups, row.act_dtypes, row.isas):
        wanted = request(weight_type, group_size=group_size, act_dtype=act_dtype, k=384, full_k=768)
        verdict = check(wanted, Machine(device=row.device, isa=isa), (row.scheme,), row.scheme)
        assert verdict.ok, (group_size, act_dtype, isa, verdict.reason)
        assert verdict.reason is None


@pytest.mark.parametrize(
    ("row", "weight_type"),
    [pytest.param(r, t, id=f"{r.device}-{r.scheme}-{t}") for r in MATRIX for t in r.weight_types],
)
@pytest.mark.parametrize("group_size", [1, 2, 4, 12, 20, 36, -2])
def test_group_sizes_are_multiples_of_a_word_of_the_layout(row, weight_type, group_size):
    wanted = request(weight_type, group_size=group_size, k=720, full_k=720)
    verdict = check(wanted, Machine(row.device, row.isas[0]), scheme=row.scheme)
    assert verdict.ok == bool(
        row.group_multiple and group_size > 0 and group_size % row.group_multiple == 0
    )
    if not verdict.ok:
        assert f"group size ({group_size}) not supported" in str(verdict.reason)


def test_weights_of_each_width_have_the_scheme_that_holds_them():
    for name, kind in WEIGHT_TYPES.items():
        expected = ("w4a16" if kind.bits <= 4 else "w8a16") if kind.packed else f"w{kind.bits}a8"
        if kind.floats:
            expected = f"fp{kind.bits}"
        assert scheme_of(name) == expected
    assert scheme_of("float4_e2m1f") is None
    assert scheme_of("uint1") is None


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (changed(weight_type="uint1b1"), ("uint1b1", "uint4b8", "uint8b128", "int4")),
        (changed(weight_type="float4_e2m1f"), ("float4_e2m1f", "uint4b8")),
        (changed(weight_type="uint8b128", group_size=6), ("6", "4", "-1")),
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


@pytest.mark.parametrize(
    ("bits", "whole"), [(2, 16), (3, 32), (4, 8), (5, 32), (6, 16), (7, 32), (8, 4)]
)
def test_shards_end_with_a_word(bits, whole):
    assert whole_words(bits) == whole
    for weight_type in (f"uint{bits}b{1 << (bits - 1)}", f"uint{bits}"):
        for k in range(1, 97):
            wanted = request(weight_type, group_size=CHANNEL, k=k, full_k=2 * k)
            assert check(wanted, HERE).ok == (k % whole == 0)
    # Zero points are packed along the output.
    for n in range(1, 97):
        wanted = request(f"uint{bits}", n=n, full_n=2 * n)
        assert check(wanted, HERE).ok == (n % whole == 0)
        wanted = request(f"uint{bits}b{1 << (bits - 1)}", n=n, full_n=2 * n)
        assert check(wanted, HERE).ok
    reason = str(split_problem(bits, whole + 1, "the input size of a shard of 999"))
    for word in ("shard of 999", f"({whole + 1})", f"multiple of {whole}:", f"{bits}-bit"):
        assert word in reason


@pytest.mark.parametrize("weight_type", ["int4", "int8"])
def test_bytes_can_be_cut_anywhere(weight_type):
    scheme = scheme_of(weight_type)
    assert check(request(weight_type, group_size=CHANNEL, k=13, full_k=26), HERE, scheme=scheme).ok


def test_odd_sizes_are_fine_where_nothing_splits_a_word():
    assert check(changed(k=100, full_k=100, n=37, group_size=CHANNEL), HERE).ok
    assert check(changed(k=100, full_k=100, n=37, group_size=100), HERE).ok
    assert check(changed(k=16, full_k=32, group_size=CHANNEL), HERE).ok


def test_processor_without_kernels_is_refused():
    for isa in (None, "none", "sse2"):
        verdict = check(GOOD, Machine(device="cpu", isa=isa))
        assert not verdict.ok
        assert "avx2" in str(verdict.reason)


@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
@pytest.mark.parametrize("act_dtype", ["bfloat16", "float16", "float32"])
def test_amx_takes_every_scheme_in_every_dtype(weight_type, act_dtype):
    """Upstream's own kernels for such a processor are no reason to leave it a layer."""
    wanted = request(weight_type, group_size=CHANNEL, act_dtype=act_dtype)
    assert check(wanted, Machine("cpu", "amx")).ok


def test_groups_of_cuda_kernels():
    """Half a slab of 64 weights, or whole ones; with codes of x sums must stay exact."""
    gpu = Machine("cuda", "sm_80")
    wide = {"k": 8192, "full_k": 8192}
    sizes = (8, 16, 32, 64, 96, 128, 256, 2048, 4096, CHANNEL)
    for weight_type, longest in (("uint4b8", 4096), ("int4", 2048)):
        taken = [
            size for size in sizes if check(request(weight_type, group_size=size, **wide), gpu).ok
        ]
        assert taken == [size for size in (32, 64, 128, 256, 2048, 4096) if size <= longest] + [
            CHANNEL
        ]
    reason = str(check(request("int4", group_size=4096, **wide), gpu).reason)
    assert "supported are 32, multiples of 64 up to 2048 and -1 (channel)" in reason
    reason = str(check(changed(act_dtype="float32"), gpu).reason)
    assert (
        reason == "activation type (float32) not supported, supported are ('bfloat16', 'float16')"
    )
    assert "no w8a16 kernel for device cuda" in str(check(request("uint8b128"), gpu).reason)


def test_other_devices_and_excluded_schemes_are_refused():
    assert "avx2" in str(check(GOOD, Machine("cuda", "avx2")).reason)
    reason = str(check(GOOD, Machine("xpu", None)).reason)
    assert reason == "no w4a16 kernel for device xpu, only for ['cpu', 'cuda']"
    assert "w4a16" in str(check(GOOD, HERE, schemes=()).reason)
    for row in MATRIX:
        others = tuple(scheme for scheme in envs.SCHEMES if scheme != row.scheme)
        verdict = check_machine(row.scheme, HERE, others)
        assert f"{row.scheme} is not among the schemes to take" in str(verdict.reason)


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
        for word in (row.scheme.upper(), *row.formats, *row.act_dtypes, row.rounding, *row.isas):
            assert word in line
    assert "2, 3 and 4 bits, symmetric and asymmetric" in lines[2]
    assert "5, 6, 7 and 8 bits, symmetric and asymmetric" in lines[3]
    assert "8 bits, symmetric |" in lines[5]


def test_importable_without_torch_and_vllm():
    import subprocess
    import sys

    code = (
        "import sys; from vllm_plugin_tm.quantization import support_matrix; "
        "assert not {'torch', 'vllm'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
