# SPDX-License-Identifier: Apache-2.0
"""cases.py and options.py: what runs by default, what a case moves and computes, refusals."""

import argparse

import pytest

from vllm_plugin_tm.bench import cases, options
from vllm_plugin_tm.bench.cases import Case, Format
from vllm_plugin_tm.bench.schemes import DEFAULT_SCHEMES, SCHEMES
from vllm_plugin_tm.quantization.support_matrix import CHANNEL


@pytest.mark.parametrize(
    ("scheme", "usual", "others"),
    [
        ("w4a16", 128, {32, 64, CHANNEL}),
        ("w8a16", 128, {CHANNEL}),
        ("w4a8", 128, {32, 64, CHANNEL}),
        ("w8a8", CHANNEL, set()),
    ],
)
def test_default_run_covers_every_scheme(scheme, usual, others):
    run = [c for c in cases.default_cases() if c.format.scheme == scheme]
    others_on = cases.LARGE if scheme == "w4a16" else cases.LARGE[:2]
    for n, k in cases.SHAPES:
        own = [c for c in run if (c.n, c.k) == (n, k)]
        group = 64 if k == 576 and usual == 128 else usual
        assert {c.m for c in own if c.format == Format(group, scheme=scheme)} == {
            2**i for i in range(11)
        }
        other = {c.format.group_size for c in own if c.format.symmetric} - {group}
        assert other == (others if (n, k) in others_on else set())
    asymmetric = {c.format.group_size for c in run if not c.format.symmetric}
    assert asymmetric == (set() if scheme == "w4a8" else {usual})
    assert len(run) == len(set(run))


@pytest.mark.parametrize(
    ("family", "usual"),
    [
        ("fp8", {"fp8-w8a8": CHANNEL, "fp8-block": 128, "fp8-w8a16": CHANNEL}),
        ("fp4", {"mxfp4": 32, "nvfp4": 16}),
    ],
)
def test_small_floats_are_measured_when_asked_for(family, usual):
    assert {c.format.scheme for c in cases.default_cases()} == set(DEFAULT_SCHEMES)
    asked = options.schemes(family)
    assert asked == tuple(usual)
    run = cases.default_cases(asked)
    for scheme, group in usual.items():
        for n, k in cases.SHAPES:
            fitted = 64 if (k, group) == (576, 128) else group
            form = Format(fitted, scheme=scheme)
            assert {c.m for c in run if (c.n, c.k, c.format) == (n, k, form)} == set(cases.BATCHES)


@pytest.mark.parametrize(
    ("scheme", "more", "message"),
    [
        ("mxfp4", {"group_sizes": (16,)}, "mxfp4 with group size 16: the format's .* is 32"),
        ("nvfp4", {"group_sizes": (CHANNEL,)}, "nvfp4 with group size channel: .* is 16"),
        ("fp8-w8a8", {"group_sizes": (64,)}, "fp8-w8a8 with group size 64: .* is channel"),
        ("fp8-block", {"symmetries": (False,)}, "fp8-block: small floats have no zero points"),
    ],
)
def test_formats_that_small_floats_lack_are_refused(scheme, more, message):
    with pytest.raises(ValueError, match=message):
        cases.chosen_cases((scheme,), ((64, 64),), (1,), **more)


def test_a_group_that_the_format_fixes_does_not_give_way():
    with pytest.raises(ValueError, match=r"shape 64x72 with group size 16: .* K=72"):
        cases.chosen_cases(("nvfp4",), ((64, 72),), (1,))


def test_small_floats_take_the_symmetric_part_of_both():
    chosen = cases.chosen_cases(("w4a16", "mxfp4"), ((64, 64),), (1,), symmetries=(True, False))
    found = [(c.format.scheme, c.format.symmetric) for c in chosen]
    assert found == [("w4a16", True), ("w4a16", False), ("mxfp4", True)]


def test_goals_for_prefill_are_measured_in_every_format():
    for form in {c.format for c in cases.default_cases() if (c.n, c.k) in cases.LARGE}:
        batches = {c.m for c in cases.default_cases() if c.format == form}
        assert 1 in batches
        assert max(batches) >= 256


def test_default_run_of_one_scheme_has_no_other():
    run = cases.default_cases(("w8a8",), "f16")
    assert {(c.format.scheme, c.format.dtype) for c in run} == {("w8a8", "f16")}


def test_quick_run_is_a_fraction_of_the_default_one():
    quick = cases.chosen_cases(("w4a16",), quick=True)
    assert len(quick) * 10 < len(cases.default_cases(("w4a16",)))
    assert {c.format.group_size for c in quick} == {128, 64}


def test_schemes_are_named_by_their_widths():
    for name in DEFAULT_SCHEMES:
        scheme = SCHEMES[name]
        assert name == f"w{scheme.weight_bits}a{8 if scheme.integer_activations else 16}"
        assert Format(scheme=name).name.startswith(f"{scheme.title}, group 128")
    assert Format(16, scheme="nvfp4").name == "NVFP4, group 16, bf16"
    assert Format(CHANNEL, scheme="fp8-w8a8").name == "FP8 W8A8, group channel, bf16"


def test_flops_and_activation_bytes():
    case = Case(4096, 1024, 4, Format())
    assert case.flops == 2 * 4 * 4096 * 1024
    assert case.activation_bytes == 4 * (1024 + 4096) * 2
    assert Case(4096, 1024, 4, Format(dtype="f32")).activation_bytes == 4 * (1024 + 4096) * 4


def test_chosen_cases_cross_everything():
    chosen = cases.chosen_cases(
        ("w4a16", "w4a8"), ((64, 64),), (1, 2), (32, CHANNEL), (True, False), ("bf16", "f16")
    )
    assert len(chosen) == len(set(chosen)) == 2 * 2 * 2 * 2 * 2


def test_asked_group_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"shape 576x576 with group size 128: .*K=576"):
        cases.chosen_cases(("w4a16",), ((576, 576),), (1,), (128,))


def test_asked_group_that_a_scheme_lacks_is_refused():
    with pytest.raises(ValueError, match=r"scheme w8a8 with group size 32: .* is channel"):
        cases.chosen_cases(("w4a8", "w8a8"), ((64, 64),), (1,), (32,))
    (case,) = cases.chosen_cases(("w8a8",), ((64, 64),), (1,), (CHANNEL,))
    assert case.format == Format(CHANNEL, scheme="w8a8")


@pytest.mark.parametrize(("scheme", "group"), [("w4a16", 64), ("w8a16", 64), ("w8a8", CHANNEL)])
def test_group_that_was_not_asked_for_gives_way(scheme, group):
    (case,) = cases.chosen_cases((scheme,), ((576, 576),), (1,))
    assert case.format == Format(group, scheme=scheme)


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (options.shapes, "4096x4096,576X576", ((4096, 4096), (576, 576))),
        (options.batches, "1,16", (1, 16)),
        (options.group_sizes, "32,channel", (32, CHANNEL)),
        (options.schemes, "w8a8,W4A16", ("w8a8", "w4a16")),
        (options.schemes, "all", tuple(SCHEMES)),
        (options.schemes, "fp4,w4a16,NVFP4", ("mxfp4", "nvfp4", "w4a16")),
        (options.dtypes, "bf16,f32", ("bf16", "f32")),
        (options.kernels, "tm,upstream-w8a8", ("tm", "upstream-w8a8")),
        (options.threads, "2", 2),
    ],
)
def test_options_are_understood(parse, text, value):
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (
            options.shapes,
            "4096x4096,4096",
            "'4096' is not of the form NxK, output by input size, for example 4096x4096",
        ),
        (options.shapes, "100x64", "'100x64': N and K must be multiples of 8"),
        (
            options.shapes,
            "0x64",
            "'0x64' is not of the form NxK, output by input size, for example 4096x4096",
        ),
        (options.batches, "1,two", "'two' is not a batch size M, for example 16"),
        (options.batches, "0", "'0' is not a batch size M, for example 16"),
        (options.group_sizes, "12", "'12': a group size must be a multiple of 8"),
        (
            options.group_sizes,
            "chanel",
            "'chanel' is not a group size: a multiple of 8, for example 128, or channel",
        ),
        (
            options.dtypes,
            "bf61",
            "'bf61' is not a known dtype; known are bf16, f16, f32; did you mean bf16?",
        ),
        (
            options.kernels,
            "upstraem",
            "'upstraem' is not a known kernel; known are tm, upstream, upstream-w8a8, "
            "upstream-bf16, torch; "
            "did you mean upstream?",
        ),
        (
            options.schemes,
            "w8a88",
            "'w8a88' is not a known scheme; known are w4a16, w8a16, w4a8, w8a8, "
            "fp8-w8a8, fp8-block, fp8-w8a16, mxfp4, nvfp4, fp8, fp4, all; did you mean w8a8?",
        ),
        (options.schemes, "w8a8,all", "'w8a8,all': all stands alone"),
        (options.threads, "-1", "'-1' is not a number of threads, for example 2"),
    ],
)
def test_options_are_refused(parse, text, message):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        parse(text)
    assert str(caught.value) == message


def test_output_files_are_checked_before_the_run(tmp_path):
    missing = tmp_path / "missing" / "a.json"
    with pytest.raises(argparse.ArgumentTypeError, match=r"the directory .*missing does not exist"):
        options.output_file(str(missing))
    with pytest.raises(argparse.ArgumentTypeError, match="is a directory"):
        options.output_file(str(tmp_path))
    with pytest.raises(argparse.ArgumentTypeError, match=r"ending in one of \.png, \.svg, \.pdf"):
        options.plot_file(str(tmp_path / "roofline.jpg"))
    assert options.plot_file(str(tmp_path / "roofline.svg")) == tmp_path / "roofline.svg"


def test_isa_names():
    available = ("avx512", "avx2")
    assert options.isas("all", available) == available
    assert options.isas("avx2,avx512", available) == available
    with pytest.raises(ValueError, match="--isa: 'avx512bf16' is not one of avx512, avx2"):
        options.isas("avx512bf16", available)
