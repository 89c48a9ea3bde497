# SPDX-License-Identifier: Apache-2.0
"""Every upstream symbol we patch or call, held against the sources of several vLLM versions."""

import importlib.util
from pathlib import Path

import pytest
from known_differences import ACCEPTED, REFUSED

from vllm_plugin_tm.patch.table import all_expectations
from vllm_plugin_tm.versions import TESTED_VLLM

# Versions outside the tested range that are known to be refused: the check itself is checked.
BEYOND = tuple(version for version in REFUSED if version not in TESTED_VLLM)


@pytest.mark.slow
@pytest.mark.parametrize("version", TESTED_VLLM + BEYOND)
def test_every_symbol_is_exactly_as_known(version, vllm_sources):
    compat = pytest.importorskip("tools.compat", reason="needs pypi-simple")
    wanted = compat.expectations()
    different = ACCEPTED.get(version, {}) | REFUSED.get(version, {})
    known = {
        symbol: different.get(symbol, expected.split(" | ")[0])
        for symbol, expected in wanted.items()
    }
    cells = compat.inspect_tree(vllm_sources(version), version, wanted)
    assert {cell.symbol: cell.found for cell in cells} == known
    broken = {cell.symbol for cell in cells if cell.verdict != "ok"}
    assert broken == set(REFUSED.get(version, {}))


@pytest.mark.slow
@pytest.mark.parametrize("version", TESTED_VLLM)
def test_the_patched_tables_hold_what_the_patches_look_for(version, vllm_sources):
    """A table without our entry's place would be patched without effect, or not at all."""
    tree = vllm_sources(version)
    linear = "vllm.model_executor.kernels.linear"
    loader = "vllm.model_executor.model_loader"
    assert "PlatformEnum.CPU" in tree.entries(f"{linear}:_POSSIBLE_KERNELS")
    assert {"'auto'", "'dummy'", "'safetensors'"} <= set(
        tree.entries(f"{loader}:_LOAD_FORMAT_TO_MODEL_LOADER")
    )
    assert tree.bases(f"{linear}.mixed_precision.cpu:CPUWNA16LinearKernel") == ("MPLinearKernel",)
    for name in ("DefaultModelLoader", "DummyModelLoader"):
        assert tree.bases(f"{loader}:{name}") == ("BaseModelLoader",)


def test_no_tested_version_is_known_to_be_refused():
    assert not set(REFUSED) & set(TESTED_VLLM)


def test_every_alternative_of_the_table_was_seen_in_a_version():
    """A form that no version has would accept an upstream that nobody has looked at."""
    seen = {
        (symbol, signature)
        for version in TESTED_VLLM
        for symbol, signature in ACCEPTED.get(version, {}).items()
    }
    older = {
        (symbol, form)
        for symbol, expected in all_expectations().items()
        for form in expected.split(" | ")[1:]
    }
    assert older == seen


@pytest.mark.slow
def test_the_sources_say_what_python_says_of_the_installed_vllm():
    """The ast reader agrees with inspect.signature on every symbol of the table."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    from tools.python_source import SourceTree
    from vllm_plugin_tm.patch import apply

    tree = SourceTree(Path(spec.origin).parents[1])
    symbols = list(all_expectations())
    assert {s: tree.describe(s) for s in symbols} == {s: apply.found_signature(s) for s in symbols}
