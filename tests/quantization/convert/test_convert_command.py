# SPDX-License-Identifier: Apache-2.0
"""`vllm-tm convert` and `vllm-tm inspect` as a user runs them."""

import json
import signal
import subprocess
import sys

import convert_cases as cases
import pytest
import torch

from vllm_plugin_tm.cli import main
from vllm_plugin_tm.quantization.convert import destination, engine, run


@pytest.fixture
def source(tmp_path):
    return cases.make(tmp_path / "src")


def test_it_converts_and_says_what_it_did(source, tmp_path, capsys):
    target = tmp_path / "dst"
    assert main(["convert", str(source), str(target), "--scheme", "w4a16", "--no-symmetric"]) == 0
    out, err = capsys.readouterr()
    assert err == "", "quiet where there is no terminal"
    assert (
        "7 matrices, 0.6 M weights, became w4a16 (group 32, asymmetric, rtn; pack-quantized)" in out
    )
    assert "1  embedding: model.embed_tokens" in out
    assert "1  output head: lm_head" in out
    assert not cases.quantization_of(target).config_groups["group_0"].weights.symmetric


@pytest.mark.parametrize(("flag", "symmetric"), [("--symmetric", True), ("--no-symmetric", False)])
def test_json_is_the_report(source, tmp_path, capsys, flag, symmetric):
    arguments = ["convert", str(source), str(tmp_path / "dst"), "--scheme", "w8a16", flag]
    assert main([*arguments, "--group-size", "channel", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["symmetric"] is symmetric
    assert (report["group_size"], report["layers"]) == (-1, 7)
    assert report["kept"] == {"model.embed_tokens": "embedding", "lm_head": "output head"}


def test_blocks_and_powers_of_two(source, tmp_path):
    target = tmp_path / "dst"
    arguments = ["--scheme", "fp8-block", "--block-size", "64", "--scales", "ue8m0"]
    assert main(["convert", str(source), str(target), *arguments]) == 0
    group = cases.quantization_of(target).config_groups["group_0"]
    assert list(group.weights.block_structure) == [64, 64]
    assert group.input_activations.group_size == 64
    scale = cases.tensors_of(target)["model.layers.0.mlp.up_proj.weight_scale"]
    assert scale.shape == (512 // 64, 256 // 64)
    assert (torch.frexp(scale.float())[0] == 0.5).all()


def test_a_dry_run_writes_nothing(source, tmp_path, capsys):
    arguments = ["convert", str(source), str(tmp_path / "dst"), "--scheme", "w4a8", "--dry-run"]
    assert main(arguments) == 0
    assert "would become w4a8" in capsys.readouterr().out
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scheme", "w4a16", "--ignore", "re:.*nothing"], "matches no module"),
        (["--scheme", "w4a16", "--max-memory", "1M"], "max_memory is 1,000,000 bytes"),
        (["--scheme", "w8a8", "--group-size", "32"], "does not go with scheme w8a8"),
        (["--scheme", "fp8", "--block-size", "32"], "does not go with scheme fp8"),
        (["--scheme", "w8a8", "--scales", "ue8m0"], "do not go with scheme w8a8"),
        (["--scheme", "w4a16", "--method", "gptq"], "needs a text to calibrate with"),
    ],
)
def test_refusals_are_one_message(source, tmp_path, capsys, arguments, words):
    assert main(["convert", str(source), str(tmp_path / "dst"), *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vllm-tm convert: ")
    assert words in err
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--scheme", "w5a5"], ["--scheme", "w4a16", "--group-size", "some"], [],
     ["--scheme", "fp8-block", "--block-size", "16"], ["--scheme", "fp8", "--scales", "e8m0"],
     ["--scheme", "w4a16", "--symmetric=no"], ["--scheme", "w4a16", "--max-memory", "lots"]],
)  # fmt: skip
def test_mistakes_in_options_are_the_parsers(source, tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(source), str(tmp_path / "dst"), *arguments])
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_and_names_the_way_on(source, tmp_path, sign):
    code = (
        "import sys, time\n"
        "from vllm_plugin_tm.cli import main\n"
        "from vllm_plugin_tm.quantization.convert import engine, run\n"
        "engine.PIECE_WEIGHTS = 1 << 12\n"
        "real, told = run.make_piece, []\n"
        "def slow(piece, plan, reader):\n"
        "    if len(told) == 3: print('working', flush=True)\n"
        "    told.append(1)\n"
        "    time.sleep(0.05)\n"
        "    yield from real(piece, plan, reader)\n"
        "run.make_piece = slow\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["convert", str(source), str(tmp_path / "dst"), "--scheme", "w4a16"]
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A test run in a shell's background has it ignored, and so would the child.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert child.stdout.readline() == "working\n"
    child.send_signal(sign)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "stopped; the same command with --resume goes on" in err
    assert "Traceback" not in err
    assert [path.name for path in (tmp_path / "dst").iterdir()] == [destination.WORK]
    assert main([*arguments, "--resume"]) == 0
    assert (tmp_path / "dst" / "config.json").is_file()


def test_what_the_command_is_made_of_is_there():
    """The names that the test above changes in the child."""
    assert engine.PIECE_WEIGHTS
    assert callable(run.make_piece)


def test_inspect_shows_schemes_kernels_and_errors(source, tmp_path, capsys):
    target = tmp_path / "dst"
    main(["convert", str(source), str(target), "--scheme", "w4a16", "--no-symmetric"])
    capsys.readouterr()
    assert main(["inspect", str(target), "--source", str(source)]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[1]: line for line in out.splitlines()[1:] if len(line.split()) > 2}
    up = lines["model.layers.*.mlp.up_proj"]
    assert "w4a16 g32 asymmetric" in up
    assert "512 x 256" in up
    assert "%" in up
    assert "bfloat16" in lines["lm_head"]
    assert main(["inspect", str(target), "--source", str(source), "--json"]) == 0
    found = {module["module"]: module for module in json.loads(capsys.readouterr().out)}
    assert 0.02 < found["model.layers.0.mlp.up_proj"]["error"]["relative"] < 0.14
    assert found["lm_head"]["error"] is None
    codes, scales, zeros = 512 * 256 // 2, 512 * 8 * 2, 64 * 8 * 4
    assert found["model.layers.0.mlp.up_proj"]["nbytes"] == codes + scales + zeros + 16


def test_inspect_tells_the_kernel_from_the_support_matrix(source, tmp_path, capsys, monkeypatch):
    from vllm_plugin_tm import machine
    from vllm_plugin_tm.quantization.support_matrix import Machine

    target = tmp_path / "dst"
    main(["convert", str(source), str(target), "--scheme", "w8a8"])
    for isa, runs_on, why in (("avx2", "TM w8a8", ""), (None, "upstream", "instruction set")):
        monkeypatch.setattr(machine, "detect", lambda isa=isa: Machine("cpu", isa))
        capsys.readouterr()
        assert main(["inspect", str(target), "--json"]) == 0
        found = {module["module"]: module for module in json.loads(capsys.readouterr().out)}
        assert found["model.layers.0.mlp.up_proj"]["kernel"] == runs_on
        assert why in found["model.layers.0.mlp.up_proj"]["why"]


@pytest.mark.parametrize("scheme", ["w8a16", "w4a8", "fp8", "fp8-block"])
def test_inspect_knows_every_scheme(source, tmp_path, capsys, scheme):
    target = tmp_path / "dst"
    more = ["--on-indivisible", "skip"]
    assert main(["convert", str(source), str(target), "--scheme", scheme, *more]) == 0
    capsys.readouterr()
    assert main(["inspect", str(target), "--source", str(source), "--json"]) == 0
    found = {module["module"]: module for module in json.loads(capsys.readouterr().out)}
    module = found["model.layers.0.mlp.up_proj"]
    assert module["scheme"].startswith(scheme.split("-")[0])
    assert module["error"]["relative"] < 0.14
    assert module["shape"] == [512, 256]


def test_inspect_asks_the_matrix_of_experts(tmp_path, capsys, monkeypatch):
    from vllm_plugin_tm import machine
    from vllm_plugin_tm.quantization.support_matrix import Machine

    source, target = cases.make(tmp_path / "moe", "qwen3_moe"), tmp_path / "dst"
    assert main(["convert", str(source), str(target), "--scheme", "w4a8"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(machine, "detect", lambda: Machine("cpu", "avx2"))
    assert main(["inspect", str(target), "--json"]) == 0
    found = {module["module"]: module for module in json.loads(capsys.readouterr().out)}
    assert found["model.layers.0.self_attn.q_proj"]["kernel"] == "TM w4a8"
    assert found["model.layers.0.mlp.experts.0.down_proj"]["kernel"] == "TM w4a8"
    assert main(["convert", str(source), str(tmp_path / "d2"), "--scheme", "w4a16"]) == 0
    monkeypatch.setenv("VLLM_PLUGIN_TM_SCHEMES", "w8a8")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "d2"), "--json"]) == 0
    found = {module["module"]: module for module in json.loads(capsys.readouterr().out)}
    assert found["model.layers.0.mlp.experts.0.down_proj"]["kernel"] == "upstream"
    assert "w4a16" in found["model.layers.0.mlp.experts.0.down_proj"]["why"]


def test_inspect_refuses_by_name(source, tmp_path, capsys):
    (source / "config.json").write_text('{"quantization_config": {"quant_method": "gguf"}}')
    assert main(["inspect", str(source)]) == 1
    assert "quant_method is 'gguf'" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().err
