# SPDX-License-Identifier: Apache-2.0
"""versions.py: which vLLM counts as tested, and that the documents agree."""

import pytest

from vllm_plugin_tm import versions


@pytest.mark.parametrize(
    ("version", "public"),
    [("0.32.0", "0.32.0"), ("0.32.0+cpu", "0.32.0"), ("0.32.0.post1", "0.32.0"), ("dev", "dev")],
)
def test_public_version(version, public):
    assert versions.public_version(version) == public


def test_tested_versions_are_silent_and_others_are_not():
    assert versions.vllm_warning("0.32.0+cpu") is None
    warning = versions.vllm_warning("0.33.1+cpu")
    assert warning is not None
    assert "0.33.1+cpu" in warning
    assert "0.32.0" in warning


def test_the_installed_version_is_a_tested_one():
    assert versions.INSTALLED_VLLM in versions.TESTED_VLLM


@pytest.mark.parametrize(
    ("version", "old"),
    [("0.27.1", True), ("0.28.0+cpu", False), ("0.9.2", True), ("1.0", False), ("dev", False)],
)
def test_too_old(version, old):
    assert versions.is_too_old(version) is old
