# SPDX-License-Identifier: Apache-2.0
"""Makes tools importable, and decides what an unreachable package index means to a test."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@pytest.fixture(scope="session")
def vllm_sources():
    """A function version -> SourceTree of vLLM's Python files, fetched once and kept in build/.

    Without an answer from any package index the test is skipped with the reason, save where the
    variable CI is set: there the network is part of the deal, and the test fails.
    """
    pytest.importorskip("pypi_simple", reason="reading a package index needs pypi-simple")
    from tools import compat, package_index

    def load(version: str):
        try:
            return compat.sources(version)
        except package_index.IndexUnreachableError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"offline: {error}")

    return load
