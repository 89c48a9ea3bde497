# SPDX-License-Identifier: Apache-2.0
"""What becomes of the figures of routed experts: rows, JSON, tables, picture, goals, page."""

import json

import goals
import make_page
import pytest
from bench_reports import moe_report, moe_rows, report

from vllm_plugin_tm.bench import plot, results, table


def test_figures_of_a_row():
    own, upstream = moe_rows(m=4)
    assert own.bytes == 16_000_000 + 2 * 4 * 4096 * 2
    assert own.flops == 4 * 2 * 3 * 2 * 4096 * 7168
    assert own.bandwidth_fraction == pytest.approx(own.bytes / 0.5e-3 / 1e9 / 40.0)
    assert own.speedups == {"upstream-bf16": pytest.approx(4.0)}
    assert (own.touched, own.experts, own.top_k) == (2.5, 8, 2)
    assert upstream.bytes - own.bytes == 48_000_000


def test_json_there_and_back_and_of_files_without_experts(routed):
    text = results.to_json(routed)
    assert results.from_json(text) == routed
    row = json.loads(text)["moe"][0]
    assert row["model"] == "mixtral"
    assert row["gbps"] == routed.moe[0].gbps
    older = json.loads(results.to_json(report()))
    del older["moe"]
    assert results.from_json(json.dumps(older)) == report()


def test_tables_have_tokens_and_the_experts_touched(routed):
    title, rows = table.sections(routed.figures)[0]
    assert title == (
        "mixtral: 8 experts, top 2, 4096 to 7168 and back, W4A16, group 128, symmetric, bf16"
    )
    columns = table.columns_for(rows)
    titles = [column.title for column in columns]
    assert titles[:3] == ["T", "experts", "kernel"]
    assert titles[-1] == "x upstream-bf16"
    assert [column.cell(rows[0]) for column in columns][:3] == ["1", "2.5", "tm avx512bf16"]
    assert len(table.rich_tables(routed)) == len(table.sections(routed.figures))


def test_picture_has_panels_of_experts(routed, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "roofline.svg"
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none"}):
        plot.save(routed, path)
    text = path.read_text()
    for shown in ("W4A16 routed experts", "W8A8 routed experts", "upstream vLLM bf16"):
        assert shown in text


def test_goals_of_experts(routed):
    outcomes = {(o.goal.scheme, o.goal.name): o for o in goals.of_experts(routed)}
    assert set(outcomes) == {
        ("w4a16", "experts, T=1: of read bandwidth"),
        ("w4a16", "experts, T=1: times upstream bf16"),
        ("w4a16", "experts, T=16 to 64: times upstream bf16"),
        ("w4a16", "experts, T=1024: of the dot peak"),
        ("w8a8", "experts, T=1: of read bandwidth"),
        ("w8a8", "experts, T=1: times upstream bf16"),
    }
    one = outcomes["w4a16", "experts, T=1: times upstream bf16"]
    assert (one.goal.must, one.reached, one.median) == (3.0, 1, pytest.approx(4.0))
    few = outcomes["w4a16", "experts, T=16 to 64: times upstream bf16"]
    assert few.worst == (pytest.approx(2.0), "mixtral, T=64, W4A16, group 128, symmetric, bf16")
    assert (few.reached, len(few.figures)) == (1, 2)
    assert outcomes["w8a8", "experts, T=1: times upstream bf16"].goal.must == 1.7


def test_page_has_a_part_for_experts_only_when_given(made_up, routed):
    assert "Routed experts" not in make_page.render([made_up], None, [])
    text = make_page.render([made_up], None, [], routed)
    part = text.partition("### Routed experts")[2]
    for shown in (
        "| layer | T | experts | ms | p10-p90 |",
        "| mixtral | 1 | 2.5 | 0.500 |",
        "| qwen3-30b-a3b | 16 | 2.5 | 0.700 |",
        "upstream-bf16 ms",
        "upstream-bf16: made-up reason",
    ):
        assert shown in part
    assert "| W4A16 | experts, T=1: times upstream bf16 | 3.00 |  | 4.00 |" in text


def test_page_reads_the_file_of_experts(made_up, tmp_path, monkeypatch):
    page, linear, moe = (tmp_path / name for name in ("page.md", "bench.json", "bench_moe.json"))
    page.write_text(f"{make_page.BEGIN}\n{make_page.END}\n")
    linear.write_text(results.to_json(made_up))
    moe.write_text(results.to_json(moe_report()))
    argv = ["make_page.py", "--bench", linear, "--moe", moe, page]
    monkeypatch.setattr("sys.argv", [str(arg) for arg in argv])
    assert make_page.main() == 0
    assert "| mixtral | 64 | 2.5 | 1.00 |" in page.read_text()
