# SPDX-License-Identifier: Apache-2.0
"""Measured choices of tiles: what is chosen, kept and read again, with the simulator for a GPU and
a clock that says which tile is fast."""

import json
import logging
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from c_structs import Layout
from sim_device import Simulator

from vllm_plugin_tm.kernels import ops

if not ops.is_available():
    pytest.skip(
        "the compiled extension is not installed: vLLM's side needs it", allow_module_level=True
    )

import sim_ops
import tiny_llama
import tiny_moe
from served_model import quantized

from vllm_plugin_tm import envs
from vllm_plugin_tm.patch import apply
from vllm_plugin_tm.tuning import choices as kept
from vllm_plugin_tm.tuning import measure

ROWS = (1, 20)
FAST = {1: "mma 128x16", 4: "mma 128x32", 20: "mma 128x64"}  # by the number of rows
LAYERS = 4  # kinds of tiny_llama's: qkv, o, gate_up, down


class Clock:
    """A device on which one tile is fast for each number of rows; the others are not."""

    def __init__(self, force: Callable[[int, bool], None], name: str = "a GPU") -> None:
        self.name, self.measured, self.room = name, 0, 1 << 20
        self.elsewhere: torch.Tensor | None = None
        self._force = force
        self._forced = (-1, False)

    def holds(self, tensor: torch.Tensor) -> bool:
        """All but one."""
        return tensor is not self.elsewhere

    def tiles(self) -> dict[str, int]:
        """As a GPU has them."""
        return measure.tiles(0)

    def force(self, tile: int, apart: bool) -> None:
        """Notes what is measured next."""
        self._forced = (tile, apart)
        self._force(tile, apart)

    def seconds(self, run: Callable[[], Any]) -> float:
        """Runs once; apart slices are the slow ones."""
        self.measured += 1
        rows = run().shape[0]
        if rows > self.room:
            raise torch.OutOfMemoryError(f"{rows} rows")
        tile, apart = self._forced
        fast = tile == self.tiles().get(FAST.get(rows, ""))
        return 1e-6 * (1 if fast else 3) + 1e-7 * apart


@pytest.fixture
def clock(simulated: Simulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """This process's device is CUDA; choices are taken back afterwards."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    chosen = []

    def choose(product: torch.Tensor, choices: torch.Tensor) -> None:
        chosen.append(product)
        simulated.choose_tiles(product, choices)

    sim_ops.use_simulator(monkeypatch, simulated)
    clock = Clock(torch.ops.vllm_plugin_tm.cuda_force_tile)
    monkeypatch.setattr(torch.ops.vllm_plugin_tm, "cuda_force_tile", clock.force)
    monkeypatch.setattr(torch.ops.vllm_plugin_tm, "cuda_choose_tiles", choose)
    apply.apply()
    yield clock
    apply.remove()
    for product in chosen:
        simulated.choose_tiles(product, torch.empty(0, 3, dtype=torch.int64))


def _load(folder: Path) -> torch.nn.Module:
    quantized(tiny_llama)(folder, 0)
    return tiny_llama.load(folder)


def _layer(model: torch.nn.Module, rows: int) -> torch.Tensor:
    module: Any = model.get_submodule("model.layers.0.self_attn.qkv_proj")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, module.input_size_per_partition, generator=generator).bfloat16()
    y: torch.Tensor = module.quant_method.apply(module, x)
    return y


def test_the_fastest_tile_is_chosen_and_kept(
    clock: Clock, simulated: Simulator, tmp_path: Path
) -> None:
    """Plans take it, results stay what they are, and the file's second reader measures nothing."""
    model = _load(tmp_path)
    path = tmp_path / "tiles.json"
    before = {rows: _layer(model, rows) for rows in (1, 20, 70)}
    assert measure.tune(model, path, clock, ROWS) == (LAYERS, LAYERS)
    assert clock.measured == LAYERS * len(ROWS) * len(clock.tiles()) * 2
    (found,) = kept.read(path).values()
    assert len(found.products) == LAYERS
    numbers = clock.tiles()
    for product, choices in found.products.items():
        assert [(c.rows, c.tile, c.apart) for c in choices] == [
            (rows, FAST[rows], False) for rows in ROWS
        ]
        assert [c.us for c in choices] == [1.0, 1.0]
        layout = Layout(product.n, product.k, product.groups)
        for rows, tile in ((1, FAST[1]), (2, FAST[20]), (20, FAST[20])):
            assert simulated.plan(layout, rows).tile == numbers[tile]
        # Beyond the last, and for other products, plans reckon.
        assert simulated.tile_rows(simulated.plan(layout, 21).tile) == 32
        assert simulated.tile_rows(simulated.plan(layout, 20, scheme="w4a8").tile) == 32
    assert all(torch.equal(_layer(model, rows), y) for rows, y in before.items())
    clock.measured = 0
    assert measure.tune(model, path, clock, ROWS) == (0, LAYERS)
    assert clock.measured == 0


def test_slices_run_apart_only_where_they_may(clock: Clock, simulated: Simulator) -> None:
    """A choice cannot ask for more counters than a device has multiprocessors."""
    layout = Layout(512, 4096, 32)
    numbers = clock.tiles()
    product = torch.tensor([0, 512, 4096, 32, 0])
    for apart in (True, False):
        choice = torch.tensor([[10_000, numbers["mma 128x8"], apart]])
        torch.ops.vllm_plugin_tm.cuda_choose_tiles(product, choice)
        assert simulated.plan(layout, 8).slices > 1
        assert simulated.plan(layout, 8).apart == apart
        assert not simulated.plan(layout, 10_000).apart


@pytest.mark.slow
def test_experts_are_chosen_for(
    clock: Clock, simulated: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their first product, whatever their second is; rows are tokens times choices."""
    quantized(tiny_moe, symmetric=False, group=32)(tmp_path, 0)
    model = tiny_llama.load(tmp_path)
    path = tmp_path / "tiles.json"
    (layer,) = [layer for layer in measure._layers(model, clock) if layer.times > 1]
    taken: list[int] = []
    plan = simulated.plan_moe_tile
    monkeypatch.setattr(simulated, "plan_moe_tile", lambda args: _noted(taken, plan(args)))

    def run(tokens: int) -> torch.Tensor:
        torch.manual_seed(3)
        return layer.call(tokens)()

    before = run(4)
    measured, known = measure.tune(model, path, clock, (4,))
    (found,) = kept.read(path).values()
    (experts,) = [product for product in found.products if product.experts]
    assert (experts.scheme, experts.experts) == ("w4a16", 4)
    (choice,) = found.products[experts]
    assert (choice.rows, choice.tile, choice.apart) == (4 * tiny_moe.TOP_K, FAST[4], False)
    assert measured == known == len(found.products)
    assert torch.equal(run(4), before)
    assert taken[-1] == clock.tiles()[FAST[4]] != taken[0]
    run(5)  # more than were measured
    assert taken[-1] == taken[0]


def _noted(notes: list[int], value: int) -> int:
    notes.append(value)
    return value


def test_other_devices_and_other_tiles_are_measured_again(clock: Clock, tmp_path: Path) -> None:
    """What another GPU was measured on stays in the file; what other kernels were, does not."""
    model = _load(tmp_path)
    path = tmp_path / "tiles.json"
    measure.tune(model, path, clock, (1,))
    clock.name = "another GPU"
    assert measure.tune(model, path, clock, (1,)) == (LAYERS, LAYERS)
    assert set(kept.read(path)) == {"a GPU", "another GPU"}
    text = path.read_text().replace("mma 128x8", "mma 128x9")
    path.write_text(text)
    assert measure.tune(model, path, clock, (1,)) == (LAYERS, LAYERS)
    devices = kept.read(path)
    assert devices["another GPU"].tiles == list(clock.tiles())
    assert "mma 128x9" in devices["a GPU"].tiles


def test_tiles_of_wgmma_have_names_of_their_own(clock: Clock, simulated: Simulator) -> None:
    mma = clock.tiles()
    with simulated.with_wgmma():
        wgmma = clock.tiles()
    assert all(name.startswith("mma ") for name in mma)
    assert all(name.startswith("wgmma ") for name in wgmma)
    assert not set(mma.values()) & set(wgmma.values())


GOOD: dict[str, Any] = {"format": kept.FORMAT, "devices": {}}
ENTRY: dict[str, Any] = {"scheme": "w4a16", "n": 64, "k": 64, "groups": 1, "experts": 0}


def _device(**entry: Any) -> dict[str, Any]:
    product = ENTRY | {"choices": []} | entry
    return GOOD | {"devices": {"a GPU": {"tiles": ["mma 128x8"], "products": [product]}}}


def _choices(*rows: int, tile: str = "mma 128x8") -> list[dict[str, Any]]:
    return [{"rows": count, "tile": tile, "apart": True, "us": 1.0} for count in rows]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not a file of measured tiles"),
        ("[]", "is not a file of measured tiles"),
        ({"format": "something else"}, "format 'something else', expected 'vllm-plugin-tm tuning"),
        ({"format": kept.FORMAT}, "KeyError"),
        (_device(scheme="w9a9"), "scheme 'w9a9'"),
        (_device(choices=_choices(8, 8)), "choices of"),
        (_device(choices=_choices(8, 1)), "choices of"),
        (_device(choices=_choices(8, tile="mma 1x1")), "choices of"),
        (_device(choices=[{"rows": 1}]), "TypeError"),
        (_device(choices=[_choices(1)[0] | {"rows": "8"}]), "TypeError"),
        (_device(n="64"), "TypeError"),
        ("\x00\x81", "is not a file of measured tiles"),
    ],
)
def test_files_that_are_none_of_ours(tmp_path: Path, content: Any, reason: str) -> None:
    path = tmp_path / "tiles.json"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(kept.TuningError, match=reason) as caught:
        kept.read(path)
    assert str(path) in str(caught.value)


def test_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    assert kept.read(path) == {}
    path.write_text(json.dumps(_device(choices=_choices(1, 8))))
    devices = kept.read(path)
    kept.write(path, devices)
    assert kept.read(path) == devices
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiles.json"]


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    """Whoever may write anywhere is told by a folder in its place."""
    path = tmp_path / "tiles.json"
    path.with_name("tiles.json.partial").mkdir()
    with pytest.raises(kept.TuningError, match=r"tiles\.json: "):
        kept.write(path, {})
    assert not path.exists()


def test_what_cannot_be_kept(
    clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No folder: refused before anything is measured. A full disk after it: the choices hold. A
    file that knows everything is not written, nor locked."""
    model = _load(tmp_path)
    with pytest.raises(kept.TuningError, match=r"missing/tiles\.json"):
        measure.tune(model, tmp_path / "missing" / "tiles.json", clock, (1,))
    assert clock.measured == 0
    path = tmp_path / "tiles.json"
    path.with_name("tiles.json.partial").mkdir()
    assert measure.tune(model, path, clock, (1,)) == (LAYERS, LAYERS)
    assert "holds for this process only" in caplog.text
    assert not path.exists()
    path.with_name("tiles.json.partial").rmdir()
    measure.tune(model, path, clock, (1,))
    lock = path.with_name("tiles.json.lock")
    lock.unlink()
    written = path.stat().st_mtime_ns
    assert measure.tune(model, path, clock, (1,)) == (0, LAYERS)
    assert not lock.exists()
    assert path.stat().st_mtime_ns == written


def test_layers_that_cannot_be_measured(
    clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights that vLLM has offloaded; more rows than there is memory for."""
    model = _load(tmp_path)
    module = model.get_submodule("model.layers.0.self_attn.qkv_proj")
    clock.elsewhere = next(module.parameters())
    clock.room = 1
    path = tmp_path / "tiles.json"
    with caplog.at_level(logging.INFO, logger="vllm.plugin_tm"):
        measured, known = measure.tune(model, path, clock, ROWS)
    assert measured == known
    assert "1 layers are not in the GPU's memory" in caplog.text
    (found,) = kept.read(path).values()
    assert {choice.rows for choices in found.products.values() for choice in choices} == {1}
    clock.room = 0
    path.unlink()
    measure.tune(model, path, clock, ROWS)
    assert not any(next(iter(kept.read(path).values())).products.values())


HOLDER = """
import sys
from pathlib import Path
from vllm_plugin_tm.tuning.choices import locked
import logging
with locked(Path(sys.argv[1]), logging.getLogger()):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_processes_take_turns(
    clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The second one waits, says so, and finds what the first one measured meanwhile."""
    model = _load(tmp_path)
    path, other = tmp_path / "tiles.json", tmp_path / "other.json"
    measure.tune(model, other, clock, (1,))
    command = [sys.executable, "-c", HOLDER, str(path)]
    clock.measured = 0
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"

        def end() -> None:
            assert holder.stdin is not None
            path.write_text(other.read_text())
            holder.stdin.close()

        timer = threading.Timer(1.0, end)
        timer.start()
        with caplog.at_level(logging.INFO, logger="vllm.plugin_tm"):
            assert measure.tune(model, path, clock, (1,)) == (0, LAYERS)
        timer.join()
    assert "waiting for another process that measures tiles" in caplog.text
    assert clock.measured == 0


def test_models_are_tuned_when_they_are_loaded(
    clock: Clock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where the variable names a file, and the log says so."""
    path = tmp_path / "tiles.json"
    monkeypatch.setattr(measure, "Gpu", lambda: clock)
    monkeypatch.setattr(measure, "ROWS", (1, 4096))
    _load(tmp_path)
    assert not path.exists()
    monkeypatch.setenv("VLLM_PLUGIN_TM_CUDA_TUNING", str(path))
    with caplog.at_level(logging.INFO, logger="vllm.plugin_tm"):
        tiny_llama.load(tmp_path, max_num_batched_tokens=64)
    assert f"for {LAYERS} kinds of layers by {path}, of which {LAYERS} were measured" in caplog.text
    assert stat.S_ISREG(path.stat().st_mode)
    (found,) = kept.read(path).values()
    assert {choices[-1].rows for choices in found.products.values()} == {64}
    tiny_llama.load(tmp_path, max_num_batched_tokens=64)
    assert f"for {LAYERS} kinds of layers by {path}, of which 0 were measured" in caplog.text


def test_the_variable_names_a_file_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_PLUGIN_TM_CUDA_TUNING", raising=False)
    assert envs.cuda_tuning() == ""
    monkeypatch.setenv("VLLM_PLUGIN_TM_CUDA_TUNING", str(tmp_path / "tiles.json"))
    assert envs.cuda_tuning() == str(tmp_path / "tiles.json")
    folder = tmp_path / "folder.json"
    folder.mkdir()
    for wrong in (folder, tmp_path / "missing" / "tiles.json", tmp_path / "tiles"):
        monkeypatch.setenv("VLLM_PLUGIN_TM_CUDA_TUNING", str(wrong))
        with pytest.raises(envs.EnvError, match=r"VLLM_PLUGIN_TM_CUDA_TUNING=.*folder that exists"):
            envs.validate()
