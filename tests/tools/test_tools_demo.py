# SPDX-License-Identifier: Apache-2.0
"""What the demo reads from the log and prints; the real server is tests/e2e's."""

import json

import pytest

from tools import demo, make_model
from tools.console import ToolError

# As vLLM 0.32 logs several lines: each has the whole prefix.
PREFIX = "(Worker pid=9) INFO 11-21 07:53:40 [model_loader.py:88] "
TABLE = [
    "vllm-plugin-tm layers: 120 of 122 on TM kernels",
    "  layers  runs on   kernel",
    "  120     TM        TMWNA16LinearKernel",
]


class Answering:
    """A server that gives 100 tokens a request."""

    def __init__(self, text=""):
        self.requests = []
        self.log = text

    def complete(self, prompt, **options):
        self.requests.append(options)
        return {"usage": {"completion_tokens": 100}}


def logged(prefix):
    return "\n".join(["INFO before", *(prefix + line for line in TABLE), prefix + "later", "x"])


@pytest.mark.parametrize("prefix", [PREFIX, ""])
def test_the_layer_table_is_found_without_the_logs_prefix(prefix):
    assert demo.layer_table(logged(prefix)) == TABLE


def test_only_the_first_workers_table_is_shown():
    assert demo.layer_table(logged(PREFIX) + "\n" + logged("(Worker pid=10) INFO ")) == TABLE


def test_a_log_without_the_table_is_an_error_that_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "")
    server = Answering()
    server.log = tmp_path / "log"
    server.log.write_text("INFO nothing")
    with pytest.raises(ToolError, match=r"not loaded \(VLLM_PLUGINS is ''\)"):
        demo._table_of(server)


def test_the_title_is_the_one_that_the_plugin_logs():
    layer_table = pytest.importorskip("vllm_plugin_tm.layer_table", reason="needs vLLM")
    assert layer_table.TITLE == demo.TABLE_TITLE


def test_speed_is_a_median_after_a_warm_up(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 14.0, 20.0, 22.0])
    monkeypatch.setattr(demo.time, "perf_counter", lambda: next(clock))
    server = Answering()
    assert demo.tokens_per_second(server) == (50.0, 75.0)
    assert len(server.requests) == demo.REPEATS + 1
    assert all(r == {"max_tokens": demo.TOKENS, "ignore_eos": True} for r in server.requests)


def test_both_arms_differ_in_the_switch_only():
    on, off = (demo.server_for(demo.layout.MODELS / "m", switch) for switch in "10")
    different = {
        name
        for name in on._environment.keys() | off._environment.keys()
        if on._environment.get(name) != off._environment.get(name)
    }
    assert different == {"VLLM_PLUGIN_TM"}


def test_the_online_demo_differs_in_the_method_too():
    model = demo.layout.MODELS / "m"
    on = demo.server_for(model, "1", demo.ONLINE_ARGUMENTS)
    assert on._command[-2:] == ["--quantization", "tm_w4a16"]


def test_the_report_has_the_ratio():
    text = demo.report([("1", 100.0, 2.0), ("0", 25.0, 1.0)])
    assert "VLLM_PLUGIN_TM=1    100.0  (2.0)" in text
    assert text.endswith("4.00")


def test_numbers_from_a_busy_machine_are_called_that():
    quiet = demo.report([("1", 100.0, 5.0), ("0", 25.0, 1.0)])
    busy = demo.report([("1", 100.0, 5.0), ("0", 25.0, 15.0)])
    assert "busy" not in quiet
    assert "something else kept this machine busy" in busy


def test_a_model_that_is_made_is_not_made_again(tmp_path, monkeypatch):
    def must_not_run(*_args, **_kwargs):
        raise AssertionError("it made the model")

    monkeypatch.setattr(demo.layout, "MODELS", tmp_path)
    monkeypatch.setattr(demo, "run", must_not_run)
    folder = tmp_path / "smollm2-135m-w4a16-g32"
    folder.mkdir()
    with pytest.raises(AssertionError, match="it made the model"):
        demo.make_model()
    (folder / "tm-model.json").write_text(json.dumps({"recipe": make_model.RECIPE}))
    assert demo.make_model() == folder
