# SPDX-License-Identifier: Apache-2.0
"""Conversions that are stopped, killed, refused or out of room: the same bytes in the end, and
nothing that looks finished before it."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import convert_cases as cases
import pytest
import torch

from vllm_plugin_tm.quantization.convert import ConvertError, Options, Watch, convert, run
from vllm_plugin_tm.quantization.convert.destination import WORK, Destination

OPTIONS = Options("w4a16", symmetric=False, shard_bytes=200_000)


@pytest.fixture
def source(tmp_path):
    return cases.make(tmp_path / "src", "qwen3_5")


@pytest.fixture
def expected(source, tmp_path):
    convert(source, tmp_path / "expected", replace(OPTIONS, workers=1))
    return cases.files_of(tmp_path / "expected")


@pytest.mark.parametrize("workers", [2, 3, 8])
@pytest.mark.parametrize("piece", [1 << 12, 1 << 15])
def test_bytes_do_not_depend_on_workers_or_pieces(
    source, expected, tmp_path, monkeypatch, workers, piece
):
    monkeypatch.setattr("vllm_plugin_tm.quantization.convert.engine.PIECE_WEIGHTS", piece)
    convert(source, tmp_path / "dst", replace(OPTIONS, workers=workers))
    assert cases.files_of(tmp_path / "dst") == expected


@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "w8a8"])
def test_bytes_do_not_depend_on_the_kernel(source, tmp_path, monkeypatch, scheme):
    """Where the extension is missing, or the processor has no AVX2, torch does the arithmetic."""
    convert(source, tmp_path / "kernel", Options(scheme))
    monkeypatch.setattr(run.compiled, "_is_available", lambda: False)
    convert(source, tmp_path / "torch", Options(scheme))
    assert cases.files_of(tmp_path / "torch") == cases.files_of(tmp_path / "kernel")


def stopped(source, target, monkeypatch, after: int) -> None:
    """Converts until so many pieces are made, then is interrupted."""
    monkeypatch.setattr("vllm_plugin_tm.quantization.convert.engine.PIECE_WEIGHTS", 1 << 13)
    made = []
    real = run.make_piece

    def counting(piece, plan, reader):
        made.append(piece)
        if len(made) > after:
            raise KeyboardInterrupt
        yield from real(piece, plan, reader)

    with monkeypatch.context() as patch:
        patch.setattr(run, "make_piece", counting)
        with pytest.raises(KeyboardInterrupt):
            convert(source, target, replace(OPTIONS, workers=1))


@pytest.mark.parametrize("after", [0, 1, 20])
def test_an_interrupted_conversion_goes_on(source, expected, tmp_path, monkeypatch, after):
    target = tmp_path / "dst"
    stopped(source, target, monkeypatch, after)
    assert [path.name for path in target.iterdir()] == [WORK]
    counted = []
    report = convert(
        source, target, replace(OPTIONS, resume=True, workers=2), Watch(advance=counted.append)
    )
    assert report.resumed
    assert cases.files_of(target) == expected
    # What was on disk was not made again.
    fresh = []
    monkeypatch.setattr("vllm_plugin_tm.quantization.convert.engine.PIECE_WEIGHTS", 1 << 13)
    convert(source, tmp_path / "fresh", OPTIONS, Watch(advance=fresh.append))
    assert len(counted) == len(fresh) - after


def test_a_stop_that_is_asked_for_is_heard(source, expected, tmp_path):
    import threading

    stop = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "dst", OPTIONS, Watch(advance=lambda _: stop.set(), stop=stop))
    assert [path.name for path in (tmp_path / "dst").iterdir()] == [WORK]
    convert(source, tmp_path / "dst", replace(OPTIONS, resume=True))
    assert cases.files_of(tmp_path / "dst") == expected


KILLED = """
import sys, time
from pathlib import Path
from vllm_plugin_tm.quantization.convert import Options, convert, destination, engine, run
engine.PIECE_WEIGHTS = 1 << 13
destination._SYNC_SECONDS = 0.0
real, made = run.make_piece, []
def slow(piece, plan, reader):
    yield from real(piece, plan, reader)
    made.append(piece)
    if len(made) == 30:
        print("in the middle", flush=True)
        time.sleep(600)
run.make_piece = slow
convert(sys.argv[1], sys.argv[2],
        Options("w4a16", symmetric=False, shard_bytes=200_000, workers=1))
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
def test_a_killed_conversion_goes_on(source, expected, tmp_path, sign):
    target = tmp_path / "dst"
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(source), str(target)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "in the middle\n"
    child.send_signal(sign)
    if sign == signal.SIGINT:
        time.sleep(0.2)
        child.kill()  # its only thread sleeps
    child.wait()
    assert [path.name for path in target.iterdir()] == [WORK]
    with pytest.raises(ConvertError, match="unfinished conversion; --resume goes on"):
        convert(source, target, OPTIONS)
    counted = []
    convert(source, target, replace(OPTIONS, resume=True), Watch(advance=counted.append))
    assert cases.files_of(target) == expected


def test_a_kill_while_files_are_moved_out_goes_on(source, expected, tmp_path, monkeypatch):
    target = tmp_path / "dst"
    real, moved = os.replace, []

    def second_fails(old, new):
        if str(new).endswith(".safetensors"):
            moved.append(new)
            if len(moved) == 2:
                raise SystemExit("killed")
        real(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", second_fails)
        with pytest.raises(SystemExit):
            convert(source, target, OPTIONS)
    assert not (target / "config.json").exists()
    convert(source, target, replace(OPTIONS, resume=True))
    assert cases.files_of(target) == expected


def test_a_kill_while_files_are_made_goes_on(source, expected, tmp_path, monkeypatch):
    """The first file is there and empty, the others are not."""
    real = os.posix_fallocate

    def killed(*arguments):
        raise SystemExit("killed")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", killed)
        with pytest.raises(SystemExit):
            convert(source, tmp_path / "dst", OPTIONS)
    assert os.posix_fallocate is real
    convert(source, tmp_path / "dst", replace(OPTIONS, resume=True))
    assert cases.files_of(tmp_path / "dst") == expected


@pytest.mark.parametrize(
    ("change", "word"),
    [({"group_size": 64}, "group_size"), ({"method": "mse"}, "method"),
     ({"ignore": ("re:.*self_attn.*",)}, "ignore")],
)  # fmt: skip
def test_other_options_do_not_go_on(source, tmp_path, monkeypatch, change, word):
    stopped(source, tmp_path / "dst", monkeypatch, 5)
    with pytest.raises(ConvertError, match=f"another {word} "):
        convert(source, tmp_path / "dst", replace(OPTIONS, resume=True, **change))
    assert (tmp_path / "dst" / WORK).is_dir()


def test_a_changed_source_does_not_go_on(source, tmp_path, monkeypatch):
    stopped(source, tmp_path / "dst", monkeypatch, 5)
    os.utime(source / "model.safetensors", (1, 1))
    with pytest.raises(ConvertError, match="another source files"):
        convert(source, tmp_path / "dst", replace(OPTIONS, resume=True))


def test_two_at_once_are_refused(source, tmp_path):
    first = Destination(tmp_path / "dst", {"pieces": 1}, resume=False)
    with pytest.raises(ConvertError, match="another conversion is writing it"):
        convert(source, tmp_path / "dst", replace(OPTIONS, resume=True))
    assert (tmp_path / "dst" / WORK).is_dir()
    first.leave()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, value):
    source = cases.make(tmp_path / "src")
    tensors = cases.tensors_of(source)
    tensors["model.layers.0.mlp.up_proj.weight"][300, 77] = value
    bad = cases.write(tmp_path / "bad", tensors, json.loads((source / "config.json").read_text()))
    with pytest.raises(ConvertError, match=r"up_proj.weight is (nan|-?inf) at output row 300, in"):
        convert(bad, tmp_path / "dst", Options("w4a16"))
    assert not (tmp_path / "dst").exists()


def test_a_truncated_shard_is_named(source, tmp_path):
    path = source / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)
    with pytest.raises(
        ConvertError, match=r"model.safetensors: truncated: tensor \S+ ends at byte"
    ):
        convert(source, tmp_path / "dst", OPTIONS)
    os.truncate(path, 5)
    with pytest.raises(ConvertError, match=r"no safetensors file, or a truncated one \(5 bytes\)"):
        convert(source, tmp_path / "dst", OPTIONS)
    assert not (tmp_path / "dst").exists()


def test_a_missing_shard_is_named(tmp_path):
    source = cases.make(tmp_path / "src", shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConvertError, match=r"names files that are not there: .*00002-of-00003"):
        convert(source, tmp_path / "dst", OPTIONS)


def test_what_is_there_is_not_overwritten(source, tmp_path):
    target = tmp_path / "dst"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with pytest.raises(ConvertError, match="there already and not empty"):
        convert(source, target, OPTIONS)
    with pytest.raises(ConvertError, match="is a file"):
        convert(source, target / "mine.txt", OPTIONS)
    assert cases.files_of(target) == {"mine.txt": b"mine"}


def test_the_source_is_never_the_destination(source):
    for target in (source, source / "quantized"):
        with pytest.raises(ConvertError, match="is SRC or inside it"):
            convert(source, target, OPTIONS)


@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="needs a folder nobody can write to")
def test_a_destination_that_cannot_be_written(source):
    with pytest.raises(ConvertError, match="/sys/kernel/dst: cannot be written: "):
        convert(source, "/sys/kernel/dst", OPTIONS)


def test_an_empty_destination_is_taken(source, expected, tmp_path):
    (tmp_path / "dst").mkdir()
    convert(source, tmp_path / "dst", OPTIONS)
    assert cases.files_of(tmp_path / "dst") == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_says_so_before_any_work(tmp_path):
    """A real file system of one megabyte, in a mount namespace of the child's own."""
    source = cases.make(tmp_path / "src")
    (tmp_path / "small").mkdir()
    code = textwrap.dedent(f"""
        from vllm_plugin_tm.quantization.convert import ConvertError, Options, convert
        try:
            convert({str(source)!r}, {str(tmp_path / "small" / "dst")!r}, Options("w8a16"))
        except ConvertError as error:
            print(error)
        import os
        print(os.listdir({str(tmp_path / "small")!r}))
    """)
    mount = f'mount -t tmpfs -o size=512k tmpfs {tmp_path / "small"} && exec "$0" -c "$1"'
    child = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, sys.executable, code],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if child.returncode:
        pytest.skip(f"no mount here: {child.stderr.strip()[-200:]}")
    message, left = child.stdout.splitlines()
    assert "no space left on the disk: of " in message
    assert "bytes needed" in message
    assert left == "[]"


def test_room_that_runs_out_later_is_said_and_can_be_gone_on_with(
    source, expected, tmp_path, monkeypatch
):
    real, calls = run.Destination.write, []

    def full(self, name, data, first):
        calls.append(name)
        if len(calls) == 9:
            from vllm_plugin_tm.quantization.convert.destination import translated

            with translated(self.folder, "cannot be written"):
                raise OSError(28, "No space left on device")
        real(self, name, data, first)

    with monkeypatch.context() as patch:
        patch.setattr(run.Destination, "write", full)
        with pytest.raises(ConvertError, match="no space left on the disk: "):
            convert(source, tmp_path / "dst", OPTIONS)
    assert not (tmp_path / "dst").exists()


def test_memory_too_small_is_refused_with_what_is_needed(source, tmp_path):
    with pytest.raises(
        ConvertError, match=r"max_memory is 1,000 bytes, but 2 workers need [\d,]+,"
    ):
        convert(source, tmp_path / "dst", replace(OPTIONS, max_memory=1000, workers=2))


def test_a_large_caller_is_not_refused_without_a_bound(source, tmp_path, monkeypatch):
    from vllm_plugin_tm.quantization.convert import engine

    monkeypatch.setattr(engine, "resident", lambda _field: 100 << 40)
    convert(source, tmp_path / "dst", OPTIONS)
    with pytest.raises(ConvertError, match="max_memory is 9,000,000,000 bytes"):
        convert(source, tmp_path / "other", replace(OPTIONS, max_memory=9 * 10**9))


@pytest.mark.slow
def test_peak_memory_keeps_its_bound_on_a_larger_checkpoint(tmp_path):
    """Two gigabytes through one, in a process of its own; the bound is over all it holds."""
    layers, size = 32, (4096, 8192)
    shape = {"dtype": "BF16", "shape": list(size)}
    nbytes = size[0] * size[1] * 2
    header, begin = {}, 0
    for layer in range(layers):
        name = f"model.layers.{layer}.mlp.fc1.weight"
        header[name] = {**shape, "data_offsets": [begin, begin + nbytes]}
        begin += nbytes
    text = json.dumps(header).encode()
    (tmp_path / "src").mkdir()
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).bfloat16()
    data = block.view(torch.uint8).numpy().tobytes()
    with (tmp_path / "src" / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(begin // len(data)):
            file.write(data)
    (tmp_path / "src" / "config.json").write_text(json.dumps({"model_type": "any"}))
    bound = 1_000_000_000
    assert begin > 2 * bound
    command = [sys.executable, "-m", "vllm_plugin_tm.cli", "convert", "src", "dst", "--json"]
    done = subprocess.run(
        [*command, "--scheme", "w4a16", "--max-memory", str(bound)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert 0 < report["peak_bytes"] <= bound
    assert report["bytes_read"] == begin
