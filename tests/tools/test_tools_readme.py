# SPDX-License-Identifier: Apache-2.0
"""README.md: its generated parts are current, and what it points at is there."""

import re

import pytest

from tools import layout, readme_tables
from tools.console import ToolError

DOCUMENTS = [layout.ROOT / "README.md", layout.ROOT / "CONTRIBUTING.md"]


def test_the_generated_parts_are_what_the_code_says():
    text = readme_tables.README.read_text()
    assert readme_tables.updated(text) == text, "run `make readme`"


def test_an_outdated_part_is_replaced_and_the_rest_kept():
    current = readme_tables.README.read_text()
    start = "<!-- generated: versions -->\n"
    before, _, rest = current.partition(start)
    outdated = f"{before}{start}Tested with vLLM 0.1.\n{rest}"
    assert readme_tables.updated(outdated) == current.replace("\r", "")


def test_a_lost_marker_is_an_error():
    with pytest.raises(ToolError, match="no markers '<!-- generated: support matrix -->'"):
        readme_tables.updated("# nothing")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text()):
        assert (layout.ROOT / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_make_targets_that_are_named_exist(document):
    makefile = (layout.ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", document.read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
