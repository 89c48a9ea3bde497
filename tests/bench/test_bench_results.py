# SPDX-License-Identifier: Apache-2.0
"""results.py, limits.py and the page's tables: the arithmetic of every figure, JSON, Markdown."""

import dataclasses
import json

import goals
import make_page
import pytest
from bench_reports import MACHINE, integer_rows, limits, moe_rows, report, rows

from vllm_plugin_tm.bench import results, table
from vllm_plugin_tm.bench.cases import Format
from vllm_plugin_tm.bench.limits import DOT_KINDS, buffer_bytes, dot_kind, drift
from vllm_plugin_tm.bench.schemes import FAMILIES
from vllm_plugin_tm.quantization.support_matrix import CHANNEL

_MOVED = 8_000_000 + (4096 + 4096) * 2


def test_figures_of_a_row():
    own = rows()[0]
    assert own.bytes == _MOVED
    assert own.ms == pytest.approx(0.25)
    assert own.gbps == pytest.approx(_MOVED / 0.25e-3 / 1e9)
    assert own.bandwidth_fraction == pytest.approx(own.gbps / 40.0)
    assert own.gflops == pytest.approx(2 * 4096 * 4096 / 0.25e-3 / 1e9)
    assert own.dot_fraction == pytest.approx(own.gflops / 400.0)
    assert own.intensity == pytest.approx(own.flops / own.bytes)
    assert own.ms_p10 < own.ms < own.ms_p90


def test_roofline_fraction_is_of_the_smaller_bound():
    for row in rows() + rows(m=128):
        bound = min(row.limits.dot_gflops, row.intensity * row.limits.read_gbps)
        assert row.roofline_fraction == pytest.approx(row.gflops / bound)


def test_speedups_are_against_the_others_only():
    own, twin, upstream, torch = rows(asymmetric=True)
    assert own.speedups == pytest.approx({"tm-symmetric": 0.96, "upstream": 6.4, "torch": 4.0})
    assert upstream.speedups["torch"] == pytest.approx(1.0 / 1.6)
    assert not own.symmetric
    assert twin.symmetric
    assert "torch" not in torch.speedups


def test_drift_names_only_what_there_is():
    assert drift(limits(40, 400), limits(42, 300)) == pytest.approx(
        {"read": 0.05, "bf16": -0.25, "fma32": -0.25}
    )


@pytest.mark.parametrize(
    ("form", "rates", "kind"),
    [
        (Format(dtype="bf16"), {"bf16": 2, "fma32": 1}, "bf16"),
        (Format(dtype="bf16"), {"bf16": 1, "int8": 4, "fma32": 2}, "fma32"),
        (Format(dtype="bf16", scheme="w4a8"), {"bf16": 1, "int8": 1, "fma32": 2}, "int8"),
        (Format(dtype="bf16", scheme="w8a16"), {"bf16": 0, "fma32": 1}, "fma32"),
        (Format(dtype="f32"), {"bf16": 2, "int8": 4, "fma32": 1}, "fma32"),
        (Format(dtype="f32", scheme="w4a8"), {"bf16": 2, "int8": 4, "fma32": 1}, "int8"),
        (Format(dtype="bf16", scheme="w8a8"), {"bf16": 2, "int8": 0, "fma32": 1}, "fma32"),
        (Format(dtype="f16", scheme="fp8-w8a8"), {"bf16": 2, "int8": 4, "fma32": 1}, "bf16"),
        (Format(dtype="f16", scheme="fp8-w8a16"), {"bf16": 2, "int8": 4, "fma32": 1}, "fma32"),
        (Format(dtype="bf16", scheme="mxfp4"), {"bf16": 2, "int8": 4, "fma32": 1}, "bf16"),
    ],
    ids=lambda value: value.name if isinstance(value, Format) else None,
)
def test_dot_kind_falls_back(form, rates, kind):
    assert dot_kind(form, rates) == kind


@pytest.mark.parametrize(
    ("dtype", "scheme", "kind", "without"),
    [
        ("bf16", "w4a16", "amx_bf16", "fma32"),
        ("f16", "w4a16", "amx_f16", "fma32"),
        ("f32", "w4a16", "fma32", "fma32"),
        ("f32", "w4a8", "amx_int8", "int8"),
        ("bf16", "w8a8", "amx_int8", "int8"),
        ("f16", "fp8-w8a8", "amx_bf16", "fma32"),
        ("f16", "fp8-w8a16", "amx_f16", "fma32"),
        ("bf16", "nvfp4", "amx_bf16", "fma32"),
    ],
)
def test_tiles_bound_what_may_use_them(dtype, scheme, kind, without):
    form = Format(dtype=dtype, scheme=scheme)
    vectors = {"bf16": 1.0, "int8": 4.0, "fma32": 2.0}
    tiles = {"amx_bf16": 16.0, "amx_f16": 8.0, "amx_int8": 32.0}
    assert dot_kind(form, vectors | tiles, tiles=True) == kind
    assert dot_kind(form, vectors | tiles) == without
    assert dot_kind(form, vectors | dict.fromkeys(tiles, 0.0), tiles=True) == without


@pytest.mark.parametrize(("scheme", "operands"), [("w4a16", "f32"), ("w4a8", "int8")])
def test_dot_kind_refuses_a_processor_without_any(scheme, operands):
    with pytest.raises(ValueError, match=f"none of the instructions .* for {operands}"):
        dot_kind(Format(dtype="f32", scheme=scheme), dict.fromkeys(DOT_KINDS, 0.0))


def test_limit_buffer_is_four_caches_in_whole_huge_pages():
    assert buffer_bytes(32 * 2**20) == 128 * 2**20
    assert buffer_bytes(100_000) == 2 * 2**20


def test_json_of_all_schemes_there_and_back(mixed):
    text = results.to_json(mixed)
    assert results.from_json(text) == mixed
    assert [row["scheme"] for row in json.loads(text)["rows"][:2]] == ["w8a8", "w8a8"]


def test_json_there_and_back(made_up):
    text = results.to_json(made_up)
    assert results.from_json(text) == made_up
    data = json.loads(text)
    assert data["schema"] == results.SCHEMA
    assert set(data) == {
        "schema", "date", "command", "machine", "before", "after", "rows", "packing", "skipped",
        "moe",
    }  # fmt: skip
    assert data["rows"][0]["roofline_fraction"] == made_up.rows[0].roofline_fraction
    assert data["packing"][0]["gbps"] == pytest.approx(8_388_608 / 2e-3 / 1e9)


@pytest.mark.parametrize("text", ['{"schema": 1}', '{"schema": 99}', "{}", "[]"])
def test_another_schema_is_refused(text):
    with pytest.raises(ValueError, match=r"not a report of `vllm-tm bench --json`: schema"):
        results.from_json(text)


def test_a_run_on_a_busy_machine_says_so():
    quiet = table.conditions(report())
    busy = table.conditions(report(after=limits(read=30.0)))
    assert not any("WARNING" in line for line in quiet)
    assert any("moved by more than 10 %" in line for line in busy)
    loaded = dataclasses.replace(report(), machine=dataclasses.replace(MACHINE, load=1.5))
    assert any("was 1.5 on 2 CPUs" in line for line in table.conditions(loaded))


def test_sections_keep_the_symmetric_twin_with_its_case(made_up):
    titles = [title for title, _ in table.sections(made_up.rows)]
    assert titles == [
        "4096 x 4096, W4A16, group 128, symmetric, bf16",
        "4096 x 4096, W4A16, group 128, asymmetric, bf16",
    ]
    asymmetric = table.sections(made_up.rows)[1][1]
    assert [row.kernel for row in asymmetric] == ["tm", "tm-symmetric", "upstream", "torch"]


def test_terminal_tables_show_every_figure(made_up):
    from rich.console import Console

    tables = table.rich_tables(made_up)
    console = Console(width=table.width(tables), record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for drawn in tables:
        console.print(drawn)
    text = console.export_text()
    for shown in ("tm avx512bf16", "0.250", "0.230-0.270", "80 %", "6.40x", "x symmetric", "0.96x"):
        assert shown in text
    assert "…" not in text


def test_integer_operations_are_not_called_floating(mixed):
    units = {title: table.columns_for(own)[6].title for title, own in table.sections(mixed.rows)}
    assert units["4096 x 4096, W8A8, group channel, symmetric, bf16"] == "GOP/s"
    assert units["4096 x 4096, W4A8, group 128, symmetric, bf16"] == "GOP/s"
    assert units["4096 x 4096, W4A16, group 128, symmetric, bf16"] == "GFLOP/s"


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "0.012"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123")]
)
def test_milliseconds(value, text):
    assert table.milliseconds(value) == text


def _outcomes(*reports):
    return {(o.goal.scheme, o.goal.name): o for o in goals.of_kernels(reports)}


def test_goals_judge_the_large_matrices(made_up):
    outcomes = _outcomes(made_up)
    bandwidth = outcomes["w4a16", "M=1: of read bandwidth"]
    assert bandwidth.worst[0] == pytest.approx(_MOVED / 0.25e-3 / 1e9 / 40.0)
    assert bandwidth.reached == len(bandwidth.figures) == 2
    twin = outcomes["w4a16", "asymmetric: speed over symmetric"]
    assert twin.median == pytest.approx(0.96)
    packing = outcomes["w4a16", "packing: GB/s of 4-bit data"]
    assert packing.worst[1].startswith("4096 x 4096, W4A16, group 128")
    assert ("w4a16", "M=16: times zentorch") not in outcomes
    assert {scheme for scheme, _ in outcomes} == {"w4a16"}


def test_goals_of_integer_schemes_judge_their_own_rows(mixed, made_up):
    outcomes = _outcomes(mixed)
    large = outcomes["w8a8", "M=1: times upstream"]
    assert [value for value, _ in large.figures] == pytest.approx([1.2])
    every = outcomes["w8a8", "every M and shape: times upstream"]
    assert [value for value, _ in every.figures] == pytest.approx([1.2, 0.8])
    assert (every.reached, every.worst[1]) == (
        1,
        "576 x 4096, M=1, W8A8, group channel, symmetric, bf16",
    )
    assert outcomes["w4a8", "M=1: times upstream"].median == pytest.approx(80.0)
    zentorch = outcomes["w4a8", "every M: times zentorch"]
    assert [value for value, _ in zentorch.figures] == pytest.approx([1.1, 1.4])
    prefill = outcomes["w4a8", "M>=256, group 128: of the dot peak"]
    assert prefill.median == pytest.approx(2 * 256 * 4096 * 4096 / 0.5e-3 / 1e9 / 800.0)
    assert ("w4a8", "M>=256, group 32: of the dot peak") not in outcomes
    own = _outcomes(made_up)
    assert {key: outcomes[key] for key in own} == own


@pytest.mark.parametrize(
    ("form", "found"),
    [
        (
            Format(CHANNEL, scheme="fp8-w8a8"),
            {
                "M=1: of read bandwidth": 0.80,
                "M=1: times upstream": 2.0,
                "M>=128: of the dot peak": 0.80,
            },
        ),
        (
            Format(scheme="fp8-block"),
            {"M=1: of read bandwidth": 0.80, "M>=128: of the dot peak": 0.80},
        ),
        (Format(32, scheme="mxfp4"), {"M=1: of read bandwidth": 0.75}),
        (Format(16, scheme="nvfp4"), {"M=1: of read bandwidth": 0.75}),
    ],
)
def test_goals_of_small_floats(form, found):
    peer = {"upstream": 1.5} if form.scheme == "fp8-w8a8" else {}
    own = [row for m in (1, 128) for row in integer_rows(form, m=m, **peer)]
    outcomes = _outcomes(dataclasses.replace(report(), rows=tuple(own), packing=()))
    assert {key: o.goal.must for key, o in outcomes.items()} == {
        (form.scheme, name): must for name, must in found.items()
    }
    assert all(len(o.figures) == 1 for o in outcomes.values())


@pytest.mark.parametrize("scheme", [name for family in FAMILIES.values() for name in family])
def test_goals_of_experts_of_small_floats(scheme):
    own = (*moe_rows(scheme=scheme), *moe_rows(m=64, scheme=scheme))
    (outcome,) = goals.of_experts(dataclasses.replace(report(), moe=own))
    assert (outcome.goal.scheme, outcome.goal.must, outcome.goal.aim) == (scheme, 0.70, 0.85)
    assert len(outcome.figures) == 1


def test_goals_by_group_size_see_that_group_only():
    fine = integer_rows(Format(32, scheme="w4a8"), m=256)
    outcomes = _outcomes(dataclasses.replace(report(), rows=tuple(fine), packing=()))
    assert list(outcomes) == [("w4a8", "M>=256, group 32: of the dot peak")]


def test_goals_on_amx_are_its_own_but_for_those_of_memory():
    four, eight = Format(scheme="w4a8"), Format(CHANNEL, scheme="w8a8")
    own = (
        *rows(isa="amx"),
        *rows(m=256, isa="amx"),
        *integer_rows(eight, m=16, isa="amx", upstream=0.6),
        *integer_rows(four, m=256, isa="amx", upstream_w8a8=0.6),
    )
    routed = (*moe_rows(isa="amx"), *moe_rows(m=1024, ms=9000.0, isa="amx"))
    outcomes = _outcomes(dataclasses.replace(report(), rows=own, packing=()))
    assert {key: (o.goal.must, o.goal.aim) for key, o in outcomes.items()} == {
        ("w4a16", "M=1: of read bandwidth"): (0.80, 0.92),
        ("w4a16", "AMX, M=1: times upstream"): (1.0, None),
        ("w4a16", "AMX, M>=256: of the tile peak"): (0.60, 0.80),
        ("w4a16", "AMX, M>=256: times upstream"): (1.0, None),
        ("w4a16", "AMX, M>=256: times torch bf16"): (1.5, None),
        ("w8a8", "AMX, M=16 to 64: times upstream"): (1.0, 1.3),
        ("w4a8", "AMX, M>=256: of the tile peak"): (0.60, 0.80),
        ("w4a8", "AMX, M>=256: times upstream-w8a8"): (1.0, 1.2),
    }
    found = goals.of_experts(dataclasses.replace(report(), moe=routed))
    assert [(o.goal.name, o.goal.must) for o in found] == [
        ("experts, T=1: of read bandwidth", 0.75),
        ("AMX, experts, T=1024: of the tile peak", 0.50),
    ]


def test_goals_of_engines_pair_the_plugin_with_its_rival():
    over = {
        "plugin W8A8": {"upstream W8A8": {"decode": 1.2, "prefill": 1.0}},
        "plugin W4A8": {"upstream W8A8": {"decode": 1.4, "prefill": 1.5}},
    }
    found = {(o.goal.scheme, o.goal.name): (o.reached, o.median) for o in goals.of_engines(over)}
    assert found == {
        ("w8a8", "decode: times upstream W8A8"): (1, 1.2),
        ("w4a8", "decode: times upstream W8A8"): (0, 1.4),
        ("w4a8", "prefill: times upstream W8A8"): (1, 1.5),
    }


def test_a_missed_goal_shows_how_many_cases_miss_it():
    assert _outcomes(report())["w4a16", "M>=128: times torch bf16"].reached == 1
    missed = goals.Outcome(goals.Goal("w4a16", "x", 1.0, None), ((0.5, "a"), (2.0, "b")))
    assert (missed.reached, missed.worst, missed.median) == (1, (0.5, "a"), 1.25)


def test_page_is_written_between_its_marks(made_up, tmp_path, monkeypatch):
    page, bench, engines = (tmp_path / name for name in ("page.md", "bench.json", "e2e.json"))
    page.write_text(f"before\n{make_page.BEGIN}\nold\n{make_page.END}\nafter\n")
    bench.write_text(results.to_json(made_up))
    engines.write_text(json.dumps(_engine_report()))
    argv = ["make_page.py", "--bench", bench, "--end-to-end", engines, page]
    monkeypatch.setattr("sys.argv", [str(arg) for arg in argv])
    assert make_page.main() == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    for shown in (
        "| 4096 x 4096 | 1 | 0.250 |",
        "| W4A16 | M=1: times upstream | 5.00 |  | 6.40 |",
        "| plugin W4A16 | 50.0 | 49.0-51.0 |",
        "| plugin W4A16 over upstream W4A16 | 5.00x | 2.00x |",
        "| W4A16 | decode: times upstream W4A16 | 3.50 |  | 5.00 |",
        "upstream: made-up reason",
    ):
        assert shown in text
    assert make_page.main() == 0
    assert page.read_text() == text


def test_page_has_a_part_for_each_scheme(mixed):
    text = make_page.render([mixed], None, [])
    parts = [line for line in text.splitlines() if line.startswith("#### ")]
    assert parts == ["#### W4A16", "#### W4A8", "#### W8A8"]
    four = text.partition("#### W4A8")[2].partition("#### W8A8")[0]
    for shown in (
        "**W4A8, group 128, symmetric, bf16**",
        "GOP/s",
        "x upstream-w8a8",
        "| 80.00x | 1.20x | 1.10x |",
        "|  | 1.20x | 1.40x |",  # upstream itself is not measured at M=256
    ):
        assert shown in four
    assert "GFLOP/s" not in four
    assert "GOP/s" not in text.partition("#### W4A16")[2].partition("#### W4A8")[0]


def test_runs_of_other_schemes_have_their_own_tables(made_up, mixed):
    text = make_page.render([made_up, mixed], None, [])
    headings = [line for line in text.splitlines() if line.startswith("### Kernels")]
    assert headings == ["### Kernels: W4A16", "### Kernels: W8A8, W4A8, W4A16"]
    assert text.count("Machine: ") == 2


def test_page_without_marks_is_left_alone(made_up, tmp_path, monkeypatch, capsys):
    page, bench = tmp_path / "page.md", tmp_path / "bench.json"
    page.write_text("words\n")
    bench.write_text(results.to_json(made_up))
    monkeypatch.setattr("sys.argv", ["make_page.py", "--bench", str(bench), str(page)])
    assert make_page.main() == 2
    assert "the page lacks the marks" in capsys.readouterr().err
    assert page.read_text() == "words\n"


def test_the_docs_page_has_its_marks(repository):
    page = (repository / "docs" / "benchmarks.md").read_text()
    assert "new" in make_page.replaced(page, "new")


def _engine_report():
    rates = {
        "plugin W4A16": {"decode": [49.0, 50.0, 51.0], "prefill": [300.0, 310.0, 290.0]},
        "upstream W4A16": {"decode": [10.0, 10.0, 10.0], "prefill": [150.0, 150.0, 150.0]},
    }
    machine = json.loads(results.to_json(report()))["machine"]
    return {
        "date": "2026-01-02 03:04 UTC",
        "command": "end_to_end.py",
        "model": "Llama-1B shapes",
        "machine": machine,
        "tokens": {"decode": 128, "prefill": 512},
        "rates": rates,
        "medians": {
            "plugin W4A16": {"decode": 50.0, "prefill": 300.0},
            "upstream W4A16": {"decode": 10.0, "prefill": 150.0},
        },
        "plugin_over": {"plugin W4A16": {"upstream W4A16": {"decode": 5.0, "prefill": 2.0}}},
    }
