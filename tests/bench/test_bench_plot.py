# SPDX-License-Identifier: Apache-2.0
"""plot.py: a picture is written, and what cannot be drawn is refused by name."""

import dataclasses

import pytest
from bench_reports import report, rows

from vllm_plugin_tm.bench import plot


@pytest.mark.parametrize("suffix", plot.SUFFIXES)
def test_picture_is_written(made_up, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"roofline{suffix}"
    plot.save(made_up, path)
    assert path.stat().st_size > 5000


def test_caption_and_legend_say_what_is_shown(made_up, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "roofline.svg"
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none"}):  # text as text, not as outlines
        plot.save(made_up, path)
    text = path.read_text()
    for shown in (
        "this plugin avx512bf16",
        "upstream vLLM W4A16",
        "read roof: 40.0 GB/s",
        "bf16 multiply-add peak: 400 GFLOP/s",
        "vllm-tm bench --quick",
        "2026-01-02",
        "Made-up CPU",
        "GFLOP/s",
    ):
        assert shown in text


def test_each_scheme_has_a_panel_of_its_own(mixed, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "roofline.svg"
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none"}):
        plot.save(mixed, path)
    text = path.read_text()
    for shown in (
        "W4A16 linear layers",
        "W4A8 linear layers",
        "W8A8 linear layers",
        "upstream vLLM W4A16",
        "upstream vLLM W4A8",
        "upstream vLLM W8A8",
        "int8 multiply-add peak: 800 GOP/s",
        "bf16 multiply-add peak: 400 GFLOP/s",
        "OP per byte",
    ):
        assert shown in text
    assert text.count("read roof: 40.0 GB/s") == 3


def test_more_kernels_than_colours_are_all_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "roofline.svg"
    import matplotlib as mpl

    isas = [f"isa{i}" for i in range(len(plot._COLORS) + 3)]
    own = rows()[0]
    many = dataclasses.replace(report(), rows=tuple(dataclasses.replace(own, isa=i) for i in isas))
    with mpl.rc_context({"svg.fonttype": "none"}):
        plot.save(many, path)
    text = path.read_text()
    assert all(f"this plugin {isa}" in text for isa in isas)


def test_other_suffix_and_empty_report_are_refused(made_up, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"ending in one of \.png"):
        plot.save(made_up, tmp_path / "roofline.txt")
    with pytest.raises(ValueError, match="no rows to draw"):
        plot.save(dataclasses.replace(made_up, rows=()), tmp_path / "roofline.png")


def test_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(plot.PlotUnavailableError, match="--plot needs matplotlib: pip install"):
        plot.require()
