# SPDX-License-Identifier: Apache-2.0
"""`vllm-tm doctor`: green where all is well, 1 and the culprit's name where something is broken."""

import json
import subprocess
import sys

import pytest

from vllm_plugin_tm import cli, envs
from vllm_plugin_tm.cli import checks, doctor
from vllm_plugin_tm.kernels import ops
from vllm_plugin_tm.patch.table import PATCHES

needs_extension = pytest.mark.skipif(not ops.is_available(), reason="the extension is not built")


@pytest.fixture
def patched_back():
    yield
    pytest.importorskip("vllm")
    if ops.is_available():
        from vllm_plugin_tm.patch import apply

        apply.remove()


@pytest.mark.slow
@needs_extension
def test_the_command_is_green_and_prints_nothing_but_json():
    pytest.importorskip("vllm")
    process = subprocess.run(
        [sys.executable, "-m", "vllm_plugin_tm.cli", "doctor", "--json"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    report = json.loads(process.stdout)
    assert report["ok"]
    assert list(report["sections"]) == list(checks._SECTIONS)
    found = {check["name"]: check for group in report["sections"].values() for check in group}
    for isa in ops.cpu_isas():
        for scheme in envs.SCHEMES:
            for kind in ("linear", "moe"):
                assert found[f"{scheme}_{kind} {isa}"]["state"] == "ok"
    head = found["lm_head w8a16"]
    assert head["state"] == "ok"
    assert head["detail"].startswith("groups 32, 64, 128, channel; quantized while loading")
    assert '{"tm_online": {"lm_head": "w8a16"}}' in head["detail"]
    for patch in ("mixed_precision", "scaled_mm", "moe_methods", "online", "model_loader"):
        assert found[patch]["detail"].startswith("not applied")


@needs_extension
def test_with_the_switch_on_patches_are_shown_as_applied(monkeypatch, capsys, patched_back):
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_PLUGIN_TM", "1")
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "applied: registry vllm.model_executor.kernels.linear:_POSSIBLE_KERNELS" in text
    assert text.count("applied: ") == len(PATCHES)
    assert "applied: subclass " in text
    assert "CompressedTensorsWNA16MoEMethod" in text
    assert text.rstrip().endswith("Everything works.")


@pytest.mark.parametrize(
    ("name", "value", "culprit"),
    [
        ("VLLM_PLUGIN_TM", "maybe", "VLLM_PLUGIN_TM"),
        ("VLLM_PLUGIN_TM_ISA", "sse", "VLLM_PLUGIN_TM_ISA"),
        ("VLLM_PLUGIN_TM_SPEED", "11", "names"),
    ],
)
def test_wrong_variables_are_found(monkeypatch, name, value, culprit):
    monkeypatch.setenv(name, value)
    failed = [check for check in checks._environment() if check.state == "fail"]
    assert [check.name for check in failed] == [culprit]
    assert name in failed[0].detail


def broken_extension(monkeypatch):
    def load():
        raise ops.ExtensionMissingError("no such file")

    monkeypatch.setattr(ops, "load", load)


def broken_kernel(monkeypatch):
    from vllm_plugin_tm import selftest

    bad = selftest.Result("w4a16_linear", "avx2", 7.0, False, "M=1")
    monkeypatch.setattr(selftest, "run", lambda scheme: bad)


def moved_upstream(monkeypatch):
    from vllm_plugin_tm.patch import apply

    monkeypatch.setattr(apply, "found_signature", lambda symbol: "(moved)")


@needs_extension
@pytest.mark.parametrize(
    ("break_it", "section", "word"),
    [
        (broken_extension, "Self-test", "no such file"),
        (broken_kernel, "Self-test", "worst error 7.00"),
        (moved_upstream, "Patches", "(moved)"),
    ],
)
def test_broken_things_are_found(monkeypatch, break_it, section, word):
    pytest.importorskip("vllm")
    break_it(monkeypatch)
    found = checks._guarded(section, checks._SECTIONS[section])
    failed = [check for check in found if check.state == "fail"]
    assert failed
    assert any(word in check.detail for check in failed)


@needs_extension
@pytest.mark.parametrize("problem", ["", "this processor has AMX, but a made-up reason"])
def test_an_amx_that_the_system_refuses_is_shown(monkeypatch, problem):
    pytest.importorskip("vllm")
    monkeypatch.setattr(ops, "amx_problem", lambda: problem)
    found = [(check.state, check.detail) for check in checks._processor() if check.name == "AMX"]
    assert found == ([("warn", problem)] if problem else [])


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_broken_thing_makes_the_status_1(monkeypatch, capsys, flags):
    section = {"Machine": lambda: [checks.Check("disk", "fail", "on fire")]}
    monkeypatch.setattr(checks, "_SECTIONS", section)
    assert cli.main(["doctor", *flags]) == 1
    text = capsys.readouterr().out
    assert "on fire" in text
    assert json.loads(text)["ok"] is False if flags else "broken: disk" in text


def test_a_section_that_dies_is_a_finding(monkeypatch):
    def dies():
        raise OSError("no /proc")

    monkeypatch.setattr(checks, "_SECTIONS", {"Machine": dies})
    report = checks.gather()
    assert not report.ok
    assert report.sections["Machine"][0].detail == "OSError: no /proc"


def test_warnings_do_not_fail():
    report = checks.Report({"A": [checks.Check("x", "warn", "odd"), checks.Check("y", "info", "")]})
    assert report.ok
    assert "WARN  x  odd" in doctor.to_text(report)


@needs_extension
def test_the_matrix_names_every_weight_type_of_every_scheme(monkeypatch):
    from vllm_plugin_tm.quantization.support_matrix import MATRIX

    lines = {check.name: check for check in checks._matrix()}
    for row in MATRIX:
        names = [name for name in lines if name.startswith(f"{row.scheme} ")]
        assert " ".join(names).split().count(row.scheme) == len(names)
        assert set(row.weight_types) <= set(" ".join(names).split())
    assert all(check.state == "ok" for check in lines.values())
    monkeypatch.setenv(envs.TAKEN_SCHEMES.name, "w4a16,w8a16,w4a8")
    (line,) = [check for check in checks._matrix() if check.name.startswith("w8a8 ")]
    assert (line.state, "not among the schemes" in line.detail) == ("info", True)


@needs_extension
def test_the_opt_in_mode_is_named(monkeypatch):
    monkeypatch.setenv(envs.INT8_ACTIVATIONS.name, "1")
    (line,) = [check for check in checks._matrix() if check.state == "warn"]
    assert f"{envs.INT8_ACTIVATIONS.name}=1" in line.detail
    listed = {check.name: check.detail for check in checks._environment()}
    assert listed[envs.INT8_ACTIVATIONS.name].startswith("1: ")


def test_every_variable_is_listed():
    assert {check.name for check in checks._environment()} == {v.name for v in envs.VARIABLES}


def test_help_and_wrong_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    assert all(name in capsys.readouterr().out for name in ["doctor"])
    with pytest.raises(SystemExit) as caught:
        cli.main(["operate"])
    assert caught.value.code == 2


@needs_extension
def test_the_matrix_says_what_groups_float_weights_have(monkeypatch):
    """Not those of integers: a format of FP4 has one size, FP8 blocks or none."""
    pytest.importorskip("torch")
    from vllm_plugin_tm import machine
    from vllm_plugin_tm.quantization.support_matrix import Machine

    monkeypatch.setattr(machine, "detect", lambda: Machine("cpu", "avx2"))
    found = {check.name: check.detail for check in checks._matrix()}
    assert found["fp4 mxfp4 nvfp4"].endswith("groups 32 (MXFP4), 16 (NVFP4)")
    assert found["fp8 float8_e4m3fn"].endswith("blocks (128 x 128 and others)")
    (integers,) = (detail for name, detail in found.items() if name.startswith("w4a16 "))
    assert integers.endswith("groups 32, 64, 128, channel")
