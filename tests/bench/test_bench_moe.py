# SPDX-License-Identifier: Apache-2.0
"""Routed experts: cases, routings, gate and peers on small layers, the run and the command."""

import argparse
import dataclasses
import json
import sys

import pytest
import torch
from bench_formats import SMALL_CACHE, needs_extension, small_group, symmetries

from vllm_plugin_tm.bench import (
    guard,
    moe_cases,
    moe_peers,
    moe_runner,
    moe_upstream,
    moe_weights,
    options,
)
from vllm_plugin_tm.bench.cases import DTYPES, Format
from vllm_plugin_tm.bench.moe_cases import LAYERS, Layer, MoeCase
from vllm_plugin_tm.bench.peers import Rounding, UnavailableError, our_rounding
from vllm_plugin_tm.bench.schemes import SCHEMES
from vllm_plugin_tm.cli import bench, main
from vllm_plugin_tm.kernels import ops
from vllm_plugin_tm.quantization.support_matrix import CHANNEL

SMALL = Layer("small", 6, 64, 96, 2)
AMX_SIZED = Layer("tiles", 4, 256, 128, 2)


def _format(scheme, symmetric=True, dtype="bf16"):
    return Format(small_group(scheme), symmetric, dtype, scheme)


FORMATS = [
    _format(scheme, symmetric, dtype)
    for scheme, facts in SCHEMES.items()
    for symmetric in (symmetries(scheme) if facts.grouped else (True,))
    for dtype in DTYPES
]


def _checked(peer, tokens):
    """moe_peers.check of a peer on its own weights."""
    weights = peer.weights
    token = moe_weights.checked_token(weights.layer, weights.format.dtype)
    calls = moe_weights.calls_of(MoeCase(weights.layer, tokens, weights.format), token)
    return moe_peers.check(
        peer, calls, moe_peers.expected(weights, token, [peer.rounding])[peer.rounding]
    )


def test_default_run_covers_layers_tokens_and_schemes():
    run = moe_cases.chosen_cases(moe_cases.MOE_SCHEMES)
    assert {case.layer.model for case in run} == set(LAYERS)
    assert {case.m for case in run} == {1, 4, 16, 64, 256, 1024}
    assert {(case.format.scheme, case.format.group_size) for case in run} == {
        ("w4a16", 128),
        ("w4a8", 128),
        ("w8a8", CHANNEL),
    }
    quick = moe_cases.chosen_cases(("w4a16",), quick=True)
    assert len(quick) * 10 < len(run)


def test_what_a_case_computes_and_moves():
    case = MoeCase(LAYERS["mixtral"], 4, Format())
    assert case.flops == 4 * 2 * 3 * 2 * 4096 * 7168
    assert case.activation_bytes == 4 * 2 * 4096 * 2


def test_a_group_that_was_not_asked_for_gives_way_and_another_is_refused():
    layers = (Layer("odd", 4, 128, 96, 2),)
    (case,) = moe_cases.chosen_cases(("w4a16",), layers, (1,))
    assert case.format.group_size == 32
    with pytest.raises(ValueError, match="layer odd with group size 128: its inputs, 128 and 96"):
        moe_cases.chosen_cases(("w4a16",), layers, (1,), (128,))


@pytest.mark.parametrize(
    ("scheme", "more", "message"),
    [
        ("mxfp4", {"group_sizes": (16,)}, "mxfp4 of routed experts, group size 16: .* is 32"),
        ("fp8-w8a8", {"group_sizes": (32,)}, "fp8-w8a8 of routed experts, .* is channel"),
        ("nvfp4", {"symmetries": (False,)}, "nvfp4: small floats have no zero points"),
        ("mxfp4", {"layers": (Layer("odd", 4, 64, 48, 2),)}, "layer odd with group size 32"),
    ],
)
def test_formats_that_small_floats_lack_are_refused(scheme, more, message):
    with pytest.raises(ValueError, match=message):
        moe_cases.chosen_cases((scheme,), **{"layers": (SMALL,), "tokens": (1,), **more})


@pytest.mark.parametrize("more", [{"group_sizes": (32,)}, {"symmetries": (False,)}])
def test_formats_that_no_op_of_experts_has_are_refused(more):
    with pytest.raises(
        ValueError, match=r"scheme w8a8 of routed experts, group size .* is channel"
    ):
        moe_cases.chosen_cases(("w8a8",), (SMALL,), (1,), **more)


def test_layers_are_understood():
    assert options.layers("mixtral,8x64x32X2") == (
        LAYERS["mixtral"],
        Layer("8x64x32x2", 8, 64, 32, 2),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mixtrall", "'mixtrall' is not a known layer; .* did you mean mixtral?"),
        ("8x64x32", "'8x64x32' is not of the form EXPERTSxHIDDENxINTERMEDIATExTOP_K"),
        ("8x64x0x2", "'8x64x0x2' is not of the form"),
        ("8x64x30x2", "'8x64x30x2': the hidden and the intermediate size must be multiples of 8"),
        ("2x64x32x3", "'2x64x32x3': top 3 of 2 experts"),
        ("", "'' is not a known layer"),
    ],
)
def test_layers_are_refused(text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        options.layers(text)


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_every_call_has_another_routing_and_the_first_the_checked_token(tokens):
    layer = Layer("wide", 64, 32, 32, 4)
    token = moe_weights.checked_token(layer, "bf16")
    calls = moe_weights.calls_of(MoeCase(layer, tokens, Format(32)), token)
    assert len({tuple(call.topk_ids.flatten().tolist()) for call in calls}) == len(calls)
    assert all(call.x is calls[0].x for call in calls)
    for row in (0, -1):
        assert torch.equal(calls[0].x[row], token.x[0])
        assert torch.equal(calls[0].topk_ids[row], token.topk_ids[0])
        assert torch.equal(calls[0].topk_weights[row], token.topk_weights[0])
    for call in calls:
        assert all(len(set(ids)) == layer.top_k for ids in call.topk_ids.tolist())
        assert torch.allclose(call.topk_weights.sum(1), torch.ones(tokens))
        assert call.experts == len(set(call.topk_ids.flatten().tolist()))
    # One token a call still visits most experts.
    visited = {expert for call in calls for expert in call.topk_ids.flatten().tolist()}
    assert len(visited) > 0.8 * layer.experts


def test_every_copy_meets_every_routing():
    used = []
    token = moe_weights.checked_token(SMALL, "bf16")
    calls = moe_weights.calls_of(MoeCase(SMALL, 1, Format(32)), token)
    places = {id(call): place for place, call in enumerate(calls)}
    applies = tuple(lambda call, i=i: used.append((i, places[id(call)])) for i in range(3))
    step = moe_peers.MoePeer("a", "", None, 1.0, applies).step(calls)
    for _ in range(3 * len(calls)):
        step()
    assert used[:4] == [(0, 0), (1, 1), (2, 2), (0, 3)]
    assert len(set(used)) == 3 * len(calls)


@needs_extension
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("tokens", [1, 20])
def test_our_peer_is_right_in_every_format(form, tokens):
    weights = moe_weights.random_experts(SMALL, form)
    for isa in ops.cpu_isas():
        assert _checked(moe_peers.ours(weights, isa, SMALL_CACHE), tokens) >= 0.0


@needs_extension
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize("row", [0, -1])
def test_the_gate_refuses_our_result_one_percent_off(scheme, which, row):
    weights = moe_weights.random_experts(SMALL, _format(scheme))
    peer = moe_peers.ours(weights, ops.get_isa(), SMALL_CACHE)
    applies = list(peer.applies)
    right = applies[which]

    def wrong(call):
        y = right(call).float()
        y[row] *= 1.02  # of two rows one: 1.4 % of the whole
        return y.to(call.x.dtype)

    applies[which] = wrong
    message = r"tm .* computes a wrong result: small, T=3, .*: relative error"
    with pytest.raises(guard.WrongResultError, match=message):
        _checked(dataclasses.replace(peer, applies=tuple(applies)), 3)


# Weights, and groups of both products.
_WEIGHTS, _GROUPS = 3 * 64 * 96, 192 * 2 + 64 * 3


@needs_extension
@pytest.mark.parametrize(
    ("form", "expert_bytes"),
    [
        (_format("w4a16"), _WEIGHTS / 2 + 2 * _GROUPS),
        (_format("w4a16", False), _WEIGHTS / 2 + 2.5 * _GROUPS),
        (_format("w8a16"), _WEIGHTS + 2 * _GROUPS),
        (_format("w8a8"), _WEIGHTS + 8 * (192 + 64)),
        (_format("fp8-w8a8"), _WEIGHTS + 4 * (192 + 64)),
        (_format("fp8-block"), _WEIGHTS + 4 * _GROUPS),
        (_format("mxfp4"), _WEIGHTS / 2 + _GROUPS),
        (_format("nvfp4"), _WEIGHTS / 2 + 2 * _GROUPS + 4 * (192 + 64)),
    ],
    ids=lambda value: value.name if isinstance(value, Format) else None,
)
def test_bytes_of_an_expert_in_our_layout(form, expert_bytes):
    weights = moe_weights.random_experts(SMALL, form)
    assert moe_peers.ours(weights, ops.get_isa(), SMALL_CACHE).expert_bytes == expert_bytes


@pytest.mark.parametrize("scheme", SCHEMES)
def test_upstream_in_bf16_is_right(scheme):
    pytest.importorskip("vllm")
    weights = moe_weights.random_experts(SMALL, _format(scheme))
    try:
        peer = moe_upstream.upstream_bf16(weights, SMALL_CACHE)
    except UnavailableError as reason:
        pytest.skip(str(reason))
    assert _checked(peer, 20) >= 0.0
    assert peer.rounding is Rounding.NONE
    assert peer.expert_bytes == 3 * 64 * 96 * 2


@pytest.mark.parametrize(
    ("layer", "form", "message"),
    [
        (SMALL, _format("w4a16", dtype="f32"), "activations in bf16 only"),
        (Layer("odd", 4, 64, 72, 2), Format(8), "odd: expected sizes that are multiples of 32"),
    ],
)
def test_upstream_in_bf16_says_what_it_does_not_take(layer, form, message):
    pytest.importorskip("vllm")
    with pytest.raises(UnavailableError, match=message):
        moe_upstream.upstream_bf16(moe_weights.random_experts(layer, form), SMALL_CACHE)


def test_a_missing_vllm_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UnavailableError, match="upstream-bf16: upstream's op cannot be imported"):
        moe_upstream.upstream_bf16(moe_weights.random_experts(SMALL, Format(32)), SMALL_CACHE)


@pytest.fixture
def vllms_amx(monkeypatch):
    """vLLM's experts for AMX, which the tests hide from it."""
    pytest.importorskip("vllm")
    if "amx" not in ops.cpu_isas():
        pytest.skip("no AMX")
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    for kind in (cpu_moe.CPUExpertsInt4, cpu_moe.CPUExpertsInt8):
        monkeypatch.setattr(kind, "_supports_current_device", staticmethod(lambda: True))


@pytest.mark.usefixtures("vllms_amx")
@pytest.mark.parametrize("scheme", moe_upstream.SCHEMES)
def test_upstream_on_amx_is_as_near_as_its_rounding_lets_it(scheme):
    weights = moe_weights.random_experts(AMX_SIZED, _format(scheme))
    peer = moe_upstream.upstream(weights, SMALL_CACHE)
    token = moe_weights.checked_token(AMX_SIZED, "bf16")
    expected = moe_peers.expected(weights, token, [peer.rounding])[peer.rounding]
    assert peer.rounding is Rounding.OWN
    assert 1e-3 < expected.noise < 0.05
    for tokens in (1, 20):
        calls = moe_weights.calls_of(MoeCase(AMX_SIZED, tokens, weights.format), token)
        assert moe_peers.check(peer, calls, expected) > 0.0
        halved = dataclasses.replace(expected, result=expected.result / 2)
        with pytest.raises(guard.WrongResultError, match="upstream computes a wrong result"):
            moe_peers.check(peer, calls, halved)


@pytest.mark.usefixtures("vllms_amx")
@pytest.mark.parametrize(
    ("layer", "form", "message"),
    [
        (
            SMALL,
            _format("w4a8"),
            "upstream: experts of W4A8: of vLLM's experts symmetric w4a16 and w8a8",
        ),
        (SMALL, _format("w8a8", dtype="f16"), "measured with activations in bf16 only"),
        (Layer("odd", 4, 64, 72, 2), Format(8), "odd: expected sizes that are multiples of 32"),
    ],
)
def test_upstream_says_what_it_does_not_take(layer, form, message):
    with pytest.raises(UnavailableError, match=message):
        moe_upstream.upstream(moe_weights.random_experts(layer, form), SMALL_CACHE)


def test_upstream_without_amx_is_a_reason():
    pytest.importorskip("vllm")
    with pytest.raises(UnavailableError, match="experts of W8A8: vLLM's kernel needs AMX"):
        moe_upstream.upstream(moe_weights.random_experts(SMALL, _format("w8a8")), SMALL_CACHE)


@pytest.mark.parametrize("scheme", ["w4a8", "fp8-w8a8", "fp8-block"])
def test_rounded_activations_are_compared_with_their_own_oracle(scheme):
    weights = moe_weights.random_experts(SMALL, _format(scheme))
    token = moe_weights.checked_token(SMALL, "bf16")
    roundings = our_rounding(weights.format), Rounding.NONE
    expected = moe_peers.expected(weights, token, roundings)
    rounded, exact = (expected[rounding].result for rounding in roundings)
    assert 1e-3 < (rounded - exact).norm() / exact.norm() < 0.05


def _plan(**changes):
    from vllm_plugin_tm.bench import timing

    plan = moe_runner.Plan(
        cases=tuple(MoeCase(SMALL, m, _format(s)) for s in ("w4a16", "w8a8") for m in (1, 3)),
        kernels=("tm", "upstream-bf16", "torch"),
        isas=ops.cpu_isas()[:1],
        threads=1,
        effort=timing.Effort(1e-5, 1e-4, (2, 2)),
        command="test",
    )
    return dataclasses.replace(plan, **changes)


@needs_extension
@pytest.mark.usefixtures("small_machine")
def test_a_run_measures_every_case_and_leaves_the_isa_as_it_was():
    before, calls = ops.get_isa(), []
    plan = _plan(isas=ops.cpu_isas(), kernels=("tm",))
    report = moe_runner.run(plan, lambda done, total, label: calls.append((done, total)))
    assert ops.get_isa() == before
    assert [(row.scheme, row.m, row.isa) for row in report.moe] == [
        (case.format.scheme, case.m, isa) for case in plan.cases for isa in ops.cpu_isas()
    ]
    assert calls[-1] == (4, 4)
    for row in report.moe:
        assert row.touched == 2 if row.m == 1 else 2 < row.touched <= 6
        assert row.limits.dot_kind
    assert not report.rows
    assert not report.packing


@needs_extension
@pytest.mark.usefixtures("small_machine")
def test_a_wrong_or_missing_peer_is_listed(monkeypatch):
    make = moe_peers.ours

    def wrong(weights, llc_bytes):
        if weights.format.scheme == "w8a8":
            raise UnavailableError("made-up reason")
        applies = (lambda call: torch.ones_like(call.x),) * 2
        peer = make(weights, ops.get_isa(), llc_bytes)
        return dataclasses.replace(peer, name="upstream-bf16", isa="", applies=applies)

    monkeypatch.setattr(moe_upstream, "upstream_bf16", wrong)
    report = moe_runner.run(_plan())
    assert {row.kernel for row in report.moe} == {"tm"}
    assert report.skipped.count("made-up reason") == 1
    assert any("upstream-bf16 computes a wrong result" in reason for reason in report.skipped)


@needs_extension
@pytest.mark.usefixtures("small_machine")
def test_our_wrong_kernel_ends_the_run(monkeypatch):
    pack = moe_peers.pack

    def packed(weights, gate_up):
        weight, scale, zero = pack(weights, gate_up)
        return weight, (scale.float() * 1.01).to(scale.dtype), zero

    monkeypatch.setattr(moe_peers, "pack", packed)
    with pytest.raises(guard.WrongResultError, match=r"tm .* computes a wrong result: small, T=1"):
        moe_runner.run(_plan())


_COMMAND = ["bench", "--moe", "6x64x96x2", "--m", "1,3", "--group-size", "32", "--threads", "1"]


@needs_extension
@pytest.mark.usefixtures("small_machine")
def test_the_command_prints_tables_and_writes_files(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    files = [tmp_path / "a.json", tmp_path / "a.png"]
    command = [*_COMMAND, "--kernels", "tm", "--json", str(files[0]), "--plot", str(files[1])]
    monkeypatch.setattr("sys.argv", ["vllm-tm", *command])
    assert main(command) == 0
    out = capsys.readouterr().out
    title = "6x64x96x2: 6 experts, top 2, 64 to 96 and back, W4A16, group 32, symmetric, bf16"
    assert title in out
    assert "packing at load" not in out
    data = json.loads(files[0].read_text())
    assert [row["m"] for row in data["moe"]] == [1, 3]
    assert data["moe"][0]["roofline_fraction"] > 0
    assert files[1].stat().st_size > 5000


@needs_extension
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--kernels", "torch"],
            "--kernels: of routed experts there are tm, upstream, upstream-bf16",
        ),
        (["--group-size", "128"], "layer 6x64x96x2 with group size 128"),
        (["--scheme", "w8a8", "--group-size", "channel", "--asymmetric"], "scheme w8a8 of routed"),
    ],
)
def test_the_command_refuses_what_cannot_run(more, message, capsys):
    assert main([*_COMMAND, *more]) == 2
    assert message in capsys.readouterr().err


def test_experts_and_matrices_are_not_measured_in_one_run(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--moe", "--shapes", "64x64"])
    assert "not allowed with argument" in capsys.readouterr().err


@needs_extension
def test_other_engines_have_no_experts(capsys):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert bench.run(parser.parse_args(["--moe"]), more=(lambda weights, llc: None,)) == 2
    assert "measured on linear layers only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "schemes", "layers"),
    [
        (["--moe"], ["w4a16", "w4a8", "w8a8"], list(LAYERS)),
        (["--moe", "mixtral"], ["w4a16", "w4a8", "w8a8"], ["mixtral"]),
        (["--moe", "--quick"], ["w4a16"], ["qwen3-30b-a3b"]),
        (["--moe", "--scheme", "fp4", "--quick"], ["mxfp4", "nvfp4"], ["qwen3-30b-a3b"]),
        (["--moe", "--scheme", "all", "--m", "1"], list(SCHEMES), list(LAYERS)),
    ],
)
def test_the_command_chooses_layers_and_schemes(given, schemes, layers):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    chosen = bench._moe_cases(parser.parse_args(given))
    assert list(dict.fromkeys(case.format.scheme for case in chosen)) == schemes
    assert list(dict.fromkeys(case.layer.model for case in chosen)) == layers
