# SPDX-License-Identifier: Apache-2.0
"""runner.py and the command with real kernels on small matrices."""

import argparse
import dataclasses
import json

import pytest
import torch
from bench_formats import needs_extension, small_group, symmetries

from vllm_plugin_tm.bench import amx, guard, limits, peers, rounds, runner, timing, upstream
from vllm_plugin_tm.bench.cases import Case, Format
from vllm_plugin_tm.bench.schemes import SCHEMES
from vllm_plugin_tm.cli import bench, main
from vllm_plugin_tm.kernels import ops


@needs_extension
def test_limit_loops_measure_something():
    loops = limits.LimitLoops(llc_bytes=2**18)
    found = loops.measure()
    assert found.read_gbps > 0
    assert found.dot_gflops["fma32"] > 0
    assert loops.dot_flops("fma32") > 0


def test_a_kind_of_two_tile_products_has_half_the_rate(monkeypatch):
    monkeypatch.setattr(limits, "_ops", lambda: argparse.Namespace(limit_dot=lambda kind, n: 3 * n))
    loops = limits.LimitLoops(llc_bytes=2**18)
    assert loops.dot("amx_f16")() == loops.dot("amx_bf16")()
    assert loops.dot_flops("amx_bf16") == 2 * loops.dot_flops("amx_f16") > 0


@pytest.mark.parametrize(("hidden", "peers_kind"), [(False, "amx_bf16"), (True, "fma32")])
def test_each_kernel_has_the_limit_of_what_it_may_use(monkeypatch, hidden, peers_kind):
    monkeypatch.setattr(amx, "is_hidden", lambda: hidden)
    monkeypatch.setattr(ops, "set_isa", lambda name: None)
    loops = argparse.Namespace(
        read=lambda: None,
        read_bytes=1,
        dot=lambda kind: lambda: None,
        dot_flops={"amx_bf16": 8, "amx_bf16_l2": 4, "fma32": 1}.get,
    )
    rates = {"amx_bf16": 8.0, "bf16": 0.0, "fma32": 1.0}
    run = rounds.Run(_plan(), 2**16, loops, rates)
    kernels = [peers.Kernel("tm", "amx"), peers.Kernel("tm", "avx2"), peers.Kernel("torch", "")]
    timed = run.time(Format(), kernels, [lambda: None] * 3)
    assert [found.dot_kind for _, found in timed] == ["amx_bf16", "fma32", peers_kind]
    assert len({found.read_gbps for _, found in timed}) == 1
    assert [found.loads_gflops is not None for _, found in timed] == [True, False, not hidden]


def _plan(**changes):
    plan = runner.Plan(
        cases=(Case(64, 64, 1, Format(32)), Case(64, 64, 3, Format(32, False))),
        kernels=("tm", "torch"),
        isas=ops.cpu_isas()[:1],
        threads=1,
        effort=timing.Effort(1e-5, 1e-4, (2, 2)),
        command="test",
    )
    return dataclasses.replace(plan, **changes)


@needs_extension
@pytest.mark.usefixtures("small_machine")
def test_a_run_measures_every_case_and_leaves_the_isa_as_it_was():
    before = ops.get_isa()
    calls = []
    report = runner.run(
        _plan(isas=ops.cpu_isas()), lambda done, total, label: calls.append((done, total))
    )
    assert ops.get_isa() == before
    isas = [("tm", isa) for isa in ops.cpu_isas()]
    first = [(row.kernel, row.isa) for row in report.rows if row.m == 1]
    second = [(row.kernel, row.isa) for row in report.rows if row.m == 3]
    assert first == [*isas, ("torch", "")]
    assert second == [*isas, ("tm-symmetric", isas[0][1]), ("torch", "")]
    assert [pack.symmetric for pack in report.packing] == [True, False]
    assert all(pack.resident_ratio <= 1.05 for pack in report.packing)
    assert calls[-1] == (2, 2)
    assert report.machine.threads == 1


@needs_extension
@pytest.mark.usefixtures("small_machine")
def test_a_wrong_peer_is_listed_and_a_peer_that_cannot_is_too():
    def wrong(layer, llc_bytes):
        return peers.Peer("wrong", "", layer, 1, (lambda x: x[:, :1] * torch.ones(layer.n),) * 2)

    def cannot(layer, llc_bytes):
        raise peers.UnavailableError("cannot: made-up reason")

    report = runner.run(_plan(more=(wrong, cannot)))
    assert {row.kernel for row in report.rows} == {"tm", "tm-symmetric", "torch"}
    assert any(reason.startswith("wrong computes a wrong result") for reason in report.skipped)
    assert report.skipped.count("cannot: made-up reason") == 1


@needs_extension
@pytest.mark.usefixtures("small_machine")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_run_of_each_scheme(scheme):
    group = small_group(scheme)
    formats = [Format(group, symmetric, scheme=scheme) for symmetric in symmetries(scheme)]
    report = runner.run(_plan(cases=tuple(Case(64, 64, 3, form) for form in formats)))
    found = [(row.format, row.kernel) for row in report.rows]
    even, *others = formats
    expected = [(even, "tm"), (even, "torch")]
    for odd in others:
        expected += [(odd, "tm"), (even, "tm-symmetric"), (odd, "torch")]
    assert found == expected
    assert [pack.format for pack in report.packing] == formats
    assert all(row.limits.dot_kind for row in report.rows)


@needs_extension
@pytest.mark.usefixtures("small_machine")
def test_a_slow_peer_is_left_out_of_large_batches():
    def slow(layer, llc_bytes):
        peer = peers.torch_linear(layer, llc_bytes)
        return dataclasses.replace(peer, name="slow", most_rows=2)

    batches = tuple(Case(64, 64, m, Format(32, scheme="w4a8")) for m in (1, 2, 3))
    report = runner.run(_plan(cases=batches, kernels=("tm",), more=(slow,)))
    assert [row.m for row in report.rows if row.kernel == "slow"] == [1, 2]
    assert report.skipped == ("slow: W4A8 beyond M=2: a call takes up to seconds",)


@needs_extension
@pytest.mark.usefixtures("small_machine")
@pytest.mark.parametrize(("scheme", "beside"), [("w4a8", True), ("w8a8", False), ("w4a16", False)])
def test_upstreams_w8a8_is_measured_beside_w4a8_only(monkeypatch, scheme, beside):
    def made(layer, llc_bytes):
        return dataclasses.replace(peers.torch_linear(layer, llc_bytes), name="upstream-w8a8")

    monkeypatch.setattr(upstream, "upstream_w8a8", made)
    case = Case(64, 64, 1, Format(small_group(scheme), scheme=scheme))
    report = runner.run(_plan(cases=(case,), kernels=("tm", "upstream-w8a8")))
    assert ("upstream-w8a8" in [row.kernel for row in report.rows]) is beside


@needs_extension
@pytest.mark.usefixtures("small_machine")
def test_our_wrong_kernel_ends_the_run(monkeypatch):
    monkeypatch.setattr(peers, "pack", _packed_with_scale(1.01, peers.pack))
    with pytest.raises(guard.WrongResultError, match=r"tm .* computes a wrong result"):
        runner.run(_plan())


def _packed_with_scale(factor, pack):
    def packed(layer, gate_up=False):
        weight, scale, zero = pack(layer, gate_up)
        return weight, (scale.float() * factor).to(scale.dtype), zero

    return packed


_COMMAND = ["bench", "--shapes", "64x64", "--m", "1", "--group-size", "32", "--threads", "1"]


@needs_extension
@pytest.mark.usefixtures("small_machine")
def test_the_command_prints_tables_and_writes_files(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    files = [tmp_path / "a.json", tmp_path / "a.png"]
    command = [*_COMMAND, "--kernels", "tm,torch", "--json", str(files[0]), "--plot", str(files[1])]
    monkeypatch.setattr("sys.argv", ["vllm-tm", *command])
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "64 x 64, W4A16, group 32, symmetric, bf16" in out
    assert "packing at load" in out
    assert "Drift:" in out
    data = json.loads(files[0].read_text())
    assert [row["kernel"] for row in data["rows"]] == ["tm", "torch"]
    assert data["command"].startswith("vllm-tm bench --shapes 64x64")
    assert files[1].stat().st_size > 5000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shapes", "64"], "argument --shapes: '64' is not of the form NxK"),
        (["--asymmetric", "--both"], "not allowed with argument --asymmetric"),
        (["--kernels", "zen"], "argument --kernels: 'zen' is not a known kernel"),
        (["--scheme", "w4a9"], "argument --scheme: 'w4a9' is not a known scheme"),
    ],
)
def test_the_command_refuses_bad_options(options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@needs_extension
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--isa", "avx1024"], "--isa: 'avx1024' is not one of"),
        (["--shapes", "64x64", "--group-size", "128"], "shape 64x64 with group size 128"),
        (["--scheme", "w8a8", "--group-size", "32"], "scheme w8a8 with group size 32"),
    ],
)
def test_the_command_refuses_what_cannot_run_here(options, message, capsys):
    assert main(["bench", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "isas"),
    [
        ([], ("amx",)),
        (["--isa", "all"], ("amx", "avx512bf16", "avx512vnni", "avx2")),
        (["--no-amx"], ("avx512vnni",)),
        (["--no-amx", "--isa", "all"], ("avx512bf16", "avx512vnni", "avx2")),
        (["--no-amx", "--isa", "amx"], "'amx' is not one of avx512bf16, avx512vnni, avx2"),
    ],
)
def test_no_amx_leaves_it_out_of_our_instruction_sets(monkeypatch, options, isas):
    monkeypatch.setattr(ops, "cpu_isas", lambda: ("amx", "avx512bf16", "avx512vnni", "avx2"))
    monkeypatch.setattr(ops, "get_isa", lambda: "amx")
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    args = parser.parse_args(options)
    if isinstance(isas, tuple):
        assert bench._isas(args.isa, args.no_amx) == isas
        return
    with pytest.raises(ValueError, match=isas):
        bench._isas(args.isa, args.no_amx)


@pytest.mark.parametrize("isa", ["avx2", "avx512bf16"])
def test_no_amx_changes_nothing_where_there_is_none(monkeypatch, isa):
    monkeypatch.setattr(ops, "cpu_isas", lambda: ("avx512bf16", "avx2"))
    monkeypatch.setattr(ops, "get_isa", lambda: isa)
    assert bench._isas(None, True) == (isa,)


@pytest.mark.parametrize(
    ("options", "schemes"),
    [
        ([], ["w4a16", "w8a16", "w4a8", "w8a8"]),
        (["--scheme", "w8a8,w4a8"], ["w8a8", "w4a8"]),
        (["--quick"], ["w4a16"]),
        (["--m", "1"], ["w4a16"]),
        (["--quick", "--scheme", "all"], list(SCHEMES)),
        (["--quick", "--scheme", "fp4"], ["mxfp4", "nvfp4"]),
    ],
)
def test_the_command_chooses_schemes(options, schemes):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    chosen = bench._cases(parser.parse_args(options))
    assert list(dict.fromkeys(case.format.scheme for case in chosen)) == schemes


def test_the_command_says_that_the_extension_is_missing(monkeypatch, capsys):
    def missing():
        raise ops.ExtensionMissingError("made-up reason")

    monkeypatch.setattr(ops, "load", missing)
    assert main(["bench", "--quick"]) == 2
    assert "vllm-tm bench: made-up reason" in capsys.readouterr().err
