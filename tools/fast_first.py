# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin (`-p tools.fast_first`) that orders the tests for workers side by side: those
that take seconds first, then the files that take minutes, so that small ones are left for the end.

pytest-xdist by itself would take files with many tests first (`--no-loadscope-reorder` ends that):
the last ones would be those with one long test.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

MINUTES = ("e2e", "csrc", "cuda", "types", "upstream")
"""Folders and files of tests that start engines, compile, check types, or run vLLM's own tests."""


def pytest_collection_modifyitems(items: "list[pytest.Item]") -> None:
    """Within the three kinds the order stays."""
    items.sort(key=_place)


def _place(item: "pytest.Item") -> int:
    if item.get_closest_marker("slow") is None:
        return 0
    folder, name = item.path.parent.name, item.path.stem.removeprefix("test_")
    return 1 if folder in MINUTES or name in MINUTES else 2
