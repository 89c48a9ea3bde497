# SPDX-License-Identifier: Apache-2.0
"""cases.py and options.py: what runs by default, what a case moves and computes, refusals."""

import argparse

import pytest

from vllm_plugin_tm.bench import cases, options
from vllm_plugin_tm.bench.cases import CHANNEL, Case, Format


def test_default_run_covers_what_the_issue_asks_for():
    run = cases.default_cases()
    for n, k in cases.SHAPES:
        own = [c for c in run if (c.n, c.k) == (n, k)]
        usual = 64 if k == 576 else 128
        at_usual = {c.m for c in own if c.format == Format(usual)}
        assert at_usual == {2**i for i in range(11)}
        groups = {c.format.group_size for c in own if c.m == 1}
        assert groups == {32, 64, CHANNEL} | ({128} if usual == 128 else set())
        assert any(not c.format.symmetric for c in own)
    assert len(run) == len(set(run))


def test_quick_run_is_a_fraction_of_the_default_one():
    assert len(cases.quick_cases()) * 10 < len(cases.default_cases())


def test_flops_and_activation_bytes():
    case = Case(4096, 1024, 4, Format())
    assert case.flops == 2 * 4 * 4096 * 1024
    assert case.activation_bytes == 4 * (1024 + 4096) * 2
    assert Case(4096, 1024, 4, Format(dtype="f32")).activation_bytes == 4 * (1024 + 4096) * 4


def test_chosen_cases_cross_everything():
    chosen = cases.chosen_cases(((64, 64),), (1, 2), (32, CHANNEL), (True, False), ("bf16", "f16"))
    assert len(chosen) == len(set(chosen)) == 2 * 2 * 2 * 2


def test_asked_group_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"shape 576x576 with group size 128: .*K=576"):
        cases.chosen_cases(((576, 576),), (1,), (128,), (True,), ("bf16",))


def test_group_that_was_not_asked_for_gives_way():
    (case,) = cases.chosen_cases(((576, 576),), (1,), None, (True,), ("bf16",))
    assert case.format.group_size == 64


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (options.shapes, "4096x4096,576X576", ((4096, 4096), (576, 576))),
        (options.batches, "1,16", (1, 16)),
        (options.group_sizes, "32,channel", (32, CHANNEL)),
        (options.dtypes, "bf16,f32", ("bf16", "f32")),
        (options.kernels, "tm", ("tm",)),
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
            "'upstraem' is not a known kernel; known are tm, upstream, torch; "
            "did you mean upstream?",
        ),
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
