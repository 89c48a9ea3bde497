# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin (`-p tools.fast_first`) that runs the tests marked slow after all the others."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_collection_modifyitems(items: "list[pytest.Item]") -> None:
    """Moves slow tests to the end; otherwise the order stays."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
