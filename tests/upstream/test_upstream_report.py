# SPDX-License-Identifier: Apache-2.0
"""The comparison of two JUnit files: what counts as a regression, and that nothing is lost."""

from tools.upstream_report import TORN, Outcome, Run, compare, read_junit, render

JUNIT = """<testsuites><testsuite name="pytest" time="12.5">
<properties><property name="patches" value="applied"/></properties>
<testcase classname="tests.a" name="good" time="1"><system-out>
INFO vllm-plugin-tm layers: 8 of 9 on TM kernels
</system-out></testcase>
<testcase classname="tests.a" name="left"><system-out>
vllm-plugin-tm layers: 0 of 9 on TM kernels
</system-out></testcase>
<testcase classname="tests.a" name="bad"><failure message="x">def f():
E       first cause
&gt;       raise
E       RuntimeError: the last cause</failure></testcase>
<testcase classname="tests.a" name="engine"><failure message="x">
E   RuntimeError: Engine core initialization failed. See root cause above.</failure><system-err>
(Worker pid=1) ERROR NotImplementedError: No MoE backend
(Worker pid=1) ERROR Exception: WorkerProc initialization failed
</system-err></testcase>
<testcase classname="tests.a" name="torn"/>
<testcase classname="tests.a" name="torn"><error message="failed on teardown"/></testcase>
<testcase classname="" name="tests.b"><error message="collection failure">E   no module x</error>
</testcase>
<testcase classname="tests.a" name="other"><skipped message="CUDA only">file:3: CUDA only</skipped>
</testcase></testsuite></testsuites>"""


def test_read_junit_takes_status_reason_and_properties(tmp_path):
    path = tmp_path / "junit.xml"
    path.write_text(JUNIT)
    found = read_junit(path)
    assert (found.patches, found.seconds) == ("applied", 12.5)
    assert found.outcomes == {
        "tests.a::good": Outcome("passed", tm_layers=True),
        "tests.a::left": Outcome("passed"),
        "tests.a::bad": Outcome("failed", "RuntimeError: the last cause"),
        "tests.a::engine": Outcome("failed", "NotImplementedError: No MoE backend"),
        "tests.a::torn": Outcome(TORN, "failed on teardown"),
        "tests.b": Outcome("error", "no module x"),
        "tests.a::other": Outcome("skipped", "CUDA only"),
    }


def test_a_missing_or_cut_file_is_a_run_without_outcomes(tmp_path):
    assert read_junit(tmp_path / "none.xml") == Run({})
    (tmp_path / "cut.xml").write_text(JUNIT[:300])
    assert read_junit(tmp_path / "cut.xml") == Run({})


def test_every_way_of_not_passing_is_a_regression():
    off = {name: Outcome("passed") for name in ("a", "b", "c", "d", "e")}
    on = {
        "a": Outcome("passed"),
        "b": Outcome("failed", "why"),
        "c": Outcome("skipped", "now skipped"),
        "d": Outcome("error", "broken"),
    }
    found = compare(off, on)
    assert found.regressions == {
        "b": "failed: why",
        "c": "skipped: now skipped",
        "d": "error: broken",
        "e": "no result: ",
    }
    assert found.counts["off"] == {"passed": 5}


def test_a_failing_tear_down_does_not_hide_a_regression():
    off = {name: Outcome(TORN) for name in ("same", "worse")} | {"new": Outcome("passed")}
    on = {"same": Outcome(TORN), "worse": Outcome("failed", "x"), "new": Outcome(TORN, "y")}
    found = compare(off, on)
    assert found.regressions == {"new": f"{TORN}: y", "worse": "failed: x"}
    assert list(found.neither) == ["same"]


def test_what_passes_in_neither_arm_is_listed_with_its_reason():
    off = {
        "both": Outcome("failed", "no such model"),
        "changed": Outcome("failed", "one"),
        "gain": Outcome("error", "was broken"),
        "skip": Outcome("skipped", "CUDA only"),
    }
    on = off | {"changed": Outcome("failed", "two"), "gain": Outcome("passed", tm_layers=True)}
    found = compare(off, on)
    assert found.neither == {
        "both": "off failed: no such model",
        "changed": "off failed: one | on failed: two",
    }
    assert found.gained == {"gain": "off error: was broken"}
    assert found.skipped == {"CUDA only": 1}
    assert (found.regressions, found.on_tm_kernels) == ({}, ["gain"])
    text = render(found)
    assert "no such model" in text
    assert "pass off, do not pass on: 0" in text
