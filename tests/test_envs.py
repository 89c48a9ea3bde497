# SPDX-License-Identifier: Apache-2.0
"""envs.py: accepted and refused spellings, and that nobody else reads the environment."""

import re
from pathlib import Path

import pytest

import vllm_plugin_tm
from vllm_plugin_tm import envs


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in envs.given():
        monkeypatch.delenv(name)


@pytest.mark.parametrize(("text", "on"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_switch_spellings(monkeypatch, text, on):
    if text is not None:
        monkeypatch.setenv("VLLM_PLUGIN_TM", text)
    assert envs.enabled() is on


@pytest.mark.parametrize("text", ["true", "yes", "2", "on", " 1", "01"])
def test_switch_refuses_other_spellings(monkeypatch, text):
    monkeypatch.setenv("VLLM_PLUGIN_TM", text)
    with pytest.raises(envs.EnvError, match=re.escape(f"VLLM_PLUGIN_TM={text!r}")) as caught:
        envs.enabled()
    assert '"1" (on)' in str(caught.value)


@pytest.mark.parametrize("text", ["auto", *envs.ISAS])
def test_isa_spellings(monkeypatch, text):
    monkeypatch.setenv("VLLM_PLUGIN_TM_ISA", text)
    assert envs.isa() == text


@pytest.mark.parametrize("text", ["AVX2", "AMX", "avx512_bf16", "avx2,avx512"])
def test_isa_refuses_other_spellings(monkeypatch, text):
    monkeypatch.setenv("VLLM_PLUGIN_TM_ISA", text)
    with pytest.raises(envs.EnvError, match=r'VLLM_PLUGIN_TM_ISA=.*"avx512bf16"'):
        envs.isa()


def test_schemes(monkeypatch):
    assert envs.schemes() == envs.SCHEMES
    assert envs.SCHEMES == ("w4a16", "w8a16", "w4a8", "w8a8", "fp8", "fp4")
    monkeypatch.setenv("VLLM_PLUGIN_TM_SCHEMES", " w4a16 ,w4a16")
    assert envs.schemes() == ("w4a16",)
    monkeypatch.setenv("VLLM_PLUGIN_TM_SCHEMES", "w8a8,w4a8")
    assert envs.schemes() == ("w8a8", "w4a8")


@pytest.mark.parametrize(("text", "on"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_int8_activations_are_off_unless_asked_for(monkeypatch, text, on):
    if text is not None:
        monkeypatch.setenv("VLLM_PLUGIN_TM_W4A16_INT8_ACTIVATIONS", text)
    assert envs.w4a16_int8_activations() is on


@pytest.mark.parametrize("text", ["true", "on", "2"])
def test_int8_activations_refuse_other_spellings(monkeypatch, text):
    monkeypatch.setenv("VLLM_PLUGIN_TM_W4A16_INT8_ACTIVATIONS", text)
    with pytest.raises(envs.EnvError, match=r'INT8_ACTIVATIONS=.*"1" \(rounded to int8\)'):
        envs.w4a16_int8_activations()


@pytest.mark.parametrize("text", ["w4a17", "w4a16,", "w4a16;w8a8", "W4A16"])
def test_schemes_refuse_other_spellings(monkeypatch, text):
    monkeypatch.setenv("VLLM_PLUGIN_TM_SCHEMES", text)
    with pytest.raises(envs.EnvError, match=r'VLLM_PLUGIN_TM_SCHEMES=.*"w4a16"'):
        envs.schemes()


def test_misspelt_name_is_refused_with_a_suggestion(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGIN_TM_SCHEME", "w4a16")
    with pytest.raises(envs.EnvError, match="did you mean VLLM_PLUGIN_TM_SCHEMES"):
        envs.validate()


def test_validate_reads_every_variable(monkeypatch):
    envs.validate()
    for variable in envs.VARIABLES:
        monkeypatch.setenv(variable.name, "no such value")
        with pytest.raises(envs.EnvError, match=variable.name):
            envs.validate()
        monkeypatch.delenv(variable.name)


def test_text_is_what_vllm_hashes_and_never_raises(monkeypatch):
    assert envs.text("VLLM_PLUGIN_TM") == "0"
    monkeypatch.setenv("VLLM_PLUGIN_TM", "1")
    assert envs.text("VLLM_PLUGIN_TM") == "1"
    monkeypatch.setenv("VLLM_PLUGIN_TM_ISA", "nonsense")
    assert envs.text("VLLM_PLUGIN_TM_ISA") == "nonsense"


def test_every_variable_is_documented():
    for variable in envs.VARIABLES:
        assert variable.name.startswith(envs.PREFIX)
        assert variable.doc
        assert variable.accepted
        variable.parse(variable.default)


def test_only_envs_reads_the_environment():
    package = Path(vllm_plugin_tm.envs.__file__).parent
    readers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"\bos\.(environ|getenv|putenv)|from os import.*environ", path.read_text())
    }
    assert readers == {"envs.py"}
