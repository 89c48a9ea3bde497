# SPDX-License-Identifier: Apache-2.0
"""peers.py, guard.py, runner.py and the command with real kernels on small matrices."""

import dataclasses
import json

import pytest
import torch

from vllm_plugin_tm.bench import guard, limits, peers, runner, timing
from vllm_plugin_tm.bench.cases import CHANNEL, DTYPES, Case, Format
from vllm_plugin_tm.cli import main
from vllm_plugin_tm.kernels import ops

needs_extension = pytest.mark.skipif(not ops.is_available(), reason="extension not built")
_SMALL_CACHE = 4096  # keeps the rotating sets small
_FORMATS = [Format(g, s, d) for g in (32, CHANNEL) for s in (True, False) for d in DTYPES]


def _x(weights, m=5):
    return torch.randn(m, weights.k, generator=torch.Generator().manual_seed(1)).to(
        weights.scale.dtype
    )


def _names(form):
    return form.name


@pytest.mark.parametrize("form", _FORMATS, ids=_names)
def test_torch_peer_is_right_in_every_format(form):
    weights = peers.random_weights(136, 64, form)
    peer = peers.torch_linear(weights, _SMALL_CACHE)
    assert guard.check(peer, weights, _x(weights)) >= 0.0


@needs_extension
@pytest.mark.parametrize("form", _FORMATS, ids=_names)
def test_our_peer_is_right_in_every_format(form):
    weights = peers.random_weights(136, 64, form)
    for isa in ops.cpu_isas():
        peer = peers.ours(weights, isa, _SMALL_CACHE)
        assert guard.check(peer, weights, _x(weights)) >= 0.0


@pytest.mark.parametrize("form", [f for f in _FORMATS if f.dtype != "f32"], ids=_names)
def test_upstream_peer_is_right_in_its_formats(form):
    pytest.importorskip("vllm")
    weights = peers.random_weights(160, 64, form)
    peer = peers.upstream(weights, _SMALL_CACHE)
    assert guard.check(peer, weights, _x(weights)) >= 0.0


def test_upstream_peer_says_what_it_does_not_take():
    pytest.importorskip("vllm")
    with pytest.raises(peers.UnavailableError, match="bf16 and f16 only"):
        peers.upstream(peers.random_weights(64, 64, Format(32, dtype="f32")), _SMALL_CACHE)
    with pytest.raises(peers.UnavailableError, match=r"Output size \(136\) not supported"):
        peers.upstream(peers.random_weights(136, 64, Format(32)), _SMALL_CACHE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", [0, -1])
def test_guard_refuses_a_scale_that_is_one_percent_off(dtype, which):
    weights = peers.random_weights(136, 64, Format(32, True, dtype))
    peer = peers.torch_linear(weights, _SMALL_CACHE)
    wrong = list(peer.applies)
    right = wrong[which]
    wrong[which] = lambda x: (right(x).float() * 1.01).to(x.dtype)
    peer = dataclasses.replace(peer, applies=tuple(wrong))
    with pytest.raises(guard.WrongResultError, match=r"torch computes a wrong result: N=136, K=64"):
        guard.check(peer, weights, _x(weights, 16))


def test_guard_refuses_what_is_not_a_number():
    weights = peers.random_weights(64, 64, Format(32))
    peer = peers.Peer("torch", "", 1, (lambda x: x * float("nan"),) * 2)
    with pytest.raises(guard.WrongResultError, match="relative error nan"):
        guard.check(peer, weights, _x(weights))


def test_copies_cover_four_caches():
    assert peers.copies_needed(weight_bytes=10, llc_bytes=100) == 40
    assert peers.copies_needed(weight_bytes=1000, llc_bytes=100) == 2


def test_steps_use_one_copy_after_the_other():
    used = []
    peer = peers.Peer("a", "", 1, tuple(lambda x, i=i: used.append(i) for i in range(3)))
    step = peer.step(torch.zeros(1))
    for _ in range(4):
        step()
    assert used == [0, 1, 2, 0]


@needs_extension
def test_limit_loops_measure_something():
    loops = limits.LimitLoops(llc_bytes=2**18)
    found = loops.measure()
    assert found.read_gbps > 0
    assert found.dot_gflops["fma32"] > 0
    assert loops.dot_flops("fma32") > 0


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


@pytest.fixture
def _small(monkeypatch):
    """A machine with a tiny cache and short limit loops; threads as they were afterwards."""
    threads = torch.get_num_threads()
    described = runner.machine.describe
    monkeypatch.setattr(
        runner.machine,
        "describe",
        lambda threads: dataclasses.replace(described(threads), llc_bytes=2**16),
    )
    monkeypatch.setattr(limits, "_EFFORT", timing.Effort(1e-5, 1e-4, (2, 2)))
    yield
    torch.set_num_threads(threads)


@needs_extension
@pytest.mark.usefixtures("_small")
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
@pytest.mark.usefixtures("_small")
def test_a_wrong_peer_is_listed_and_a_peer_that_cannot_is_too():
    def wrong(weights, llc_bytes):
        return peers.Peer("wrong", "", 1, (lambda x: x[:, :1] * torch.ones(weights.n),) * 2)

    def cannot(weights, llc_bytes):
        raise peers.UnavailableError("cannot: made-up reason")

    report = runner.run(_plan(more=(wrong, cannot)))
    assert {row.kernel for row in report.rows} == {"tm", "tm-symmetric", "torch"}
    assert any(reason.startswith("wrong computes a wrong result") for reason in report.skipped)
    assert report.skipped.count("cannot: made-up reason") == 1


@needs_extension
@pytest.mark.usefixtures("_small")
def test_our_wrong_kernel_ends_the_run(monkeypatch):
    monkeypatch.setattr(peers, "pack", _packed_with_scale(1.01, peers.pack))
    with pytest.raises(guard.WrongResultError, match=r"tm .* computes a wrong result"):
        runner.run(_plan())


def _packed_with_scale(factor, pack):
    def packed(weights):
        weight, scale, zero = pack(weights)
        return weight, (scale.float() * factor).to(scale.dtype), zero

    return packed


_COMMAND = ["bench", "--shapes", "64x64", "--m", "1", "--group-size", "32", "--threads", "1"]


@needs_extension
@pytest.mark.usefixtures("_small")
def test_the_command_prints_tables_and_writes_files(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    files = [tmp_path / "a.json", tmp_path / "a.png"]
    command = [*_COMMAND, "--kernels", "tm,torch", "--json", str(files[0]), "--plot", str(files[1])]
    monkeypatch.setattr("sys.argv", ["vllm-tm", *command])
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "64 x 64, group 32, symmetric, bf16" in out
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
    ],
)
def test_the_command_refuses_what_cannot_run_here(options, message, capsys):
    assert main(["bench", *options]) == 2
    assert message in capsys.readouterr().err


def test_the_command_says_that_the_extension_is_missing(monkeypatch, capsys):
    def missing():
        raise ops.ExtensionMissingError("made-up reason")

    monkeypatch.setattr(ops, "load", missing)
    assert main(["bench", "--quick"]) == 2
    assert "vllm-tm bench: made-up reason" in capsys.readouterr().err
