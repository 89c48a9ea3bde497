# SPDX-License-Identifier: Apache-2.0
"""The scripts of benchmarks/ without any engine: worker processes, model configuration, reports."""

import argparse
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import end_to_end
import llama_1b
import pytest
import qwen3_30b
import workers
from bench_formats import needs_extension

from vllm_plugin_tm.quantization.online import options as online_options

BOUND = {"read_gbps": 30.0, "bytes_per_token": 1.5e9, "tokens_per_s": 20.0}

_SCRIPT = """
import sys, time
sys.path.insert(0, {benchmarks!r})
import workers

def load():
    print("noise that is no answer")
    {during_load}
    return lambda prompt, new: time.sleep(0.001 * (prompt + new))

workers.serve(load)
"""


def _engine(tmp_path, during_load="pass", environment=None):
    script = tmp_path / "worker.py"
    benchmarks = str(Path(workers.__file__).parent)
    script.write_text(
        textwrap.dedent(_SCRIPT).format(benchmarks=benchmarks, during_load=during_load)
    )
    return workers.Engine("made-up", [sys.executable, str(script)], environment or {})


def _state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_worker_answers_and_is_stopped_between_questions(tmp_path):
    with workers.Worker(_engine(tmp_path), tmp_path / "log") as worker:
        pid = worker._process.pid
        # Any number: on a busy machine these milliseconds say nothing, not even their sign.
        assert isinstance(worker.ask(workers.ASK_DECODE, 4), float)
        assert worker.ask(workers.ASK_PREFILL, 8) > 0
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
        assert _state(pid) == "T"
    assert "noise that is no answer" in (tmp_path / "log").read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIG_DFL)


def test_worker_that_fails_to_load_shows_its_log(tmp_path):
    engine = _engine(tmp_path, during_load="raise SystemExit('no such model')")
    with pytest.raises(workers.WorkerError, match=r"(?s)made-up ended; .*no such model"):
        workers.Worker(engine, tmp_path / "log")


def test_decode_leaves_the_prompt_out_and_prefill_counts_it(monkeypatch):
    monkeypatch.setattr(workers, "_seconds", lambda generate, prompt, new: prompt + 0.5 * new)
    assert workers._decode(None, 128) == pytest.approx(2.0)
    assert workers._prefill(None, 512) == pytest.approx(512 / 512.5)


def test_a_script_that_is_told_to_end_leaves_no_worker(tmp_path):
    engine = _engine(tmp_path)
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys, time; sys.path.insert(0, {str(Path(workers.__file__).parent)!r})\n"
        "import workers; from pathlib import Path\n"
        "workers.end_with_this_process()\n"
        f"engine = workers.Engine('a', {engine.command!r}, {{}})\n"
        f"with workers.Worker(engine, Path({str(tmp_path / 'log')!r})) as worker:\n"
        "    print(worker._process.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE) as process:
        pid = int(process.stdout.readline())
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("has", "lacks", "message"),
    [
        ("our kernel", (), "does not mention our kernel"),
        ("noise", ("answer",), "mentions answer, and must not"),
    ],
)
def test_worker_under_the_wrong_name_is_refused(tmp_path, has, lacks, message):
    plain = _engine(tmp_path)
    engine = workers.Engine(plain.name, plain.command, {}, log_has=has, log_lacks=lacks)
    with pytest.raises(workers.WorkerError, match=message):
        workers.Worker(engine, tmp_path / "log")


def test_worker_environment_sets_and_unsets(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_GONE", "1")
    check = (
        "import os; assert os.environ.get('BENCH_SET') == 'x' and 'BENCH_GONE' not in os.environ"
    )
    engine = _engine(tmp_path, check, {"BENCH_SET": "x", "BENCH_GONE": None})
    with workers.Worker(engine, tmp_path / "log"):
        pass


@pytest.mark.parametrize(
    ("scheme", "layout", "bits", "activations"),
    [
        (None, None, None, None),
        ("w4a16", "pack-quantized", 4, None),
        ("w8a8", "int-quantized", 8, 8),
        ("w4a8", "int-quantized", 4, 8),
    ],
)
def test_model_configuration_is_understood(tmp_path, scheme, layout, bits, activations):
    transformers = pytest.importorskip("transformers")
    directory = llama_1b.write(tmp_path / "model", scheme)
    config = transformers.AutoConfig.from_pretrained(directory)
    assert (config.hidden_size, config.intermediate_size) == (2048, 8192)
    assert [path.name for path in directory.iterdir()] == ["config.json"]
    found = json.loads((directory / "config.json").read_text()).get("quantization_config")
    if scheme is None:
        assert found is None
        return
    assert found["format"] == layout
    quantization = pytest.importorskip("compressed_tensors.quantization")
    known = quantization.QuantizationConfig.model_validate(found)
    group = known.config_groups["group_0"]
    assert group.weights.num_bits == bits
    assert group.weights.group_size == (128 if bits == 4 else None)
    assert (group.input_activations and group.input_activations.num_bits) == activations


def test_experts_of_the_other_model_are_quantized_and_routers_are_not(tmp_path):
    transformers = pytest.importorskip("transformers")
    directory = qwen3_30b.write(tmp_path / "model", "w4a16")
    config = transformers.AutoConfig.from_pretrained(directory)
    assert (config.num_experts, config.num_experts_per_tok) == (128, 8)
    ignore = json.loads((directory / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignore == ["lm_head", r"re:.*\.gate$"]
    # 8 experts and the attention of 48 layers at 4.125 bits, routers and head in bf16.
    assert qwen3_30b.bytes_per_token() == pytest.approx(2.06e9, rel=0.01)


@needs_extension
def test_what_memory_bounds_a_decode_step_to():
    bound = end_to_end._bound(1)
    assert bound["read_gbps"] > 0
    assert bound["tokens_per_s"] == pytest.approx(
        bound["read_gbps"] * 1e9 / qwen3_30b.bytes_per_token()
    )


def test_engine_names_are_checked():
    assert end_to_end._engine_names("plugin-w8a8,bf16") == ("plugin-w8a8", "bf16")
    with pytest.raises(argparse.ArgumentTypeError, match="'plugin' is not an engine; known are"):
        end_to_end._engine_names("plugin")


WITH_CHECKPOINTS = [n for n in end_to_end._DEFAULT_ENGINES["llama-1b"] if n != "llamacpp"]


@pytest.mark.parametrize("name", WITH_CHECKPOINTS)
def test_every_engine_is_started_as_what_it_is_called(tmp_path, monkeypatch, name):
    started = []
    monkeypatch.setattr(end_to_end, "Worker", lambda engine, log: started.append(engine))
    end_to_end._start(name, argparse.Namespace(threads=1, model="llama-1b"), tmp_path)
    (engine,) = started
    plugin, _, scheme = name.rpartition("-")
    assert engine.environment["VLLM_PLUGIN_TM"] == ("1" if plugin == "plugin" else None)
    assert Path(engine.command[-2]).name == scheme
    assert json.loads(engine.command[-1]) == {}
    assert engine.name == f"{plugin or 'upstream'} {scheme if scheme == 'bf16' else scheme.upper()}"
    assert ("TM" in engine.log_has) is (plugin == "plugin")
    # A log that one engine must have is one that all others must not.
    others = {kind.chosen for kind in end_to_end._ENGINES.values()} - {"", engine.log_has}
    assert set(engine.log_lacks) == others


@pytest.mark.parametrize(
    ("name", "hidden", "isa"),
    [
        ("plugin-w4a16", True, "avx512vnni"),
        ("plugin-w4a16", False, None),
        ("upstream-w4a16", True, None),
    ],
)
def test_no_amx_is_for_our_kernels_too(tmp_path, monkeypatch, name, hidden, isa):
    started = []
    monkeypatch.setattr(end_to_end, "Worker", lambda engine, log: started.append(engine))
    monkeypatch.setattr(end_to_end.amx, "is_hidden", lambda: hidden)
    monkeypatch.setattr(end_to_end.amx, "isa", lambda: "avx512vnni")
    end_to_end._start(name, argparse.Namespace(threads=1, model="llama-1b"), tmp_path)
    assert started[0].environment.get("VLLM_PLUGIN_TM_ISA") == isa


def test_engines_that_quantize_while_loading_differ_in_the_head_alone(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(end_to_end, "Worker", lambda engine, log: started.append(engine))
    for name in ("plugin-online", "plugin-online-head"):
        end_to_end._start(name, argparse.Namespace(threads=1, model="llama-1b"), tmp_path)
    plain, head = (json.loads(engine.command[-1]) for engine in started)
    assert head["additional_config"]["tm_online"].pop("lm_head") == "w8a16"
    assert plain == head
    assert started[0].command[:-1] == started[1].command[:-1]
    options = online_options.parse(plain["quantization"], plain["additional_config"])
    assert options.group_size == llama_1b.GROUP_SIZE


def test_kernel_classes_of_the_logs_exist():
    pytest.importorskip("vllm")
    from vllm.model_executor.kernels import linear

    from vllm_plugin_tm.quantization.compressed_tensors.schemes import (
        compressed_tensors_w4a8_int,
        compressed_tensors_w8a8_int8,
        compressed_tensors_wNa16,
    )

    modules = (
        linear,
        compressed_tensors_w4a8_int,
        compressed_tensors_w8a8_int8,
        compressed_tensors_wNa16,
    )
    for kind in end_to_end._ENGINES.values():
        verb, _, name = kind.chosen.partition(" ")
        assert verb == ("" if not name else "Selected" if "Int8ScaledMM" in name else "Using")
        assert not name or any(hasattr(module, name) for module in modules)


def test_end_to_end_report_pairs_its_rounds():
    measured = {
        "plugin W4A16": {"decode": [10.0, 20.0, 30.0], "prefill": [1.0, 1.0, 1.0]},
        "plugin W8A8": {"decode": [5.0, 4.0, 10.0], "prefill": [1.0, 1.0, 1.0]},
        "upstream W4A16": {"decode": [5.0, 4.0, 10.0], "prefill": [2.0, 2.0, 2.0]},
        "plugin tm_w4a16": {"decode": [1.0, 2.0, 5.0], "prefill": [1.0, 1.0, 1.0]},
        "plugin tm_w4a16 with head": {"decode": [2.0, 3.0, 5.0], "prefill": [1.0, 1.0, 1.0]},
    }
    args = argparse.Namespace(threads=2, decode=128, prefill=512, model="llama-1b")
    report = end_to_end._report(
        args, measured, dict.fromkeys(measured, 1.0), dict.fromkeys(measured, 2**31)
    )
    assert report["plugin_over"] == {
        "plugin W4A16": {"upstream W4A16": {"decode": 3.0, "prefill": 0.5}},
        "plugin W8A8": {"upstream W4A16": {"decode": 1.0, "prefill": 0.5}},
        "plugin tm_w4a16": {"upstream W4A16": {"decode": 0.5, "prefill": 0.5}},
        "plugin tm_w4a16 with head": {
            "upstream W4A16": {"decode": 0.5, "prefill": 0.5},
            "plugin tm_w4a16": {"decode": 1.5, "prefill": 1.0},
        },
    }
    assert report["medians"]["plugin W4A16"]["decode"] == 20.0
    text = end_to_end._text(report | {"bound": BOUND})
    assert "loaded in 1 s, at most 2.0 GiB in memory" in text
    assert "bound by memory: 20.0 tok/s (1.50 GB a token at 30.0 GB/s)" in text
    assert "plugin W4A16 over upstream W4A16: decode 3.00x, prefill 0.50x" in text
    assert json.loads(json.dumps(report)) == report or report["machine"]["flags"]
