# SPDX-License-Identifier: Apache-2.0
"""Updates of weights, by both of upstream's ways: what they give, and that a wrong one changes
nothing. tests/e2e/test_update_engines.py has the engine around them."""

import gc
import re
from pathlib import Path

import float_llama
import pytest
import tiny_llama
import tiny_moe
import torch
from safetensors.torch import load_file, save_file

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

from served_model import SIZES, Served, plain, quantized, same

from vllm_plugin_tm.patch import apply
from vllm_plugin_tm.quantization.online.options import KEY
from vllm_plugin_tm.updates import update as updates
from vllm_plugin_tm.updates.backup import Backup
from vllm_plugin_tm.updates.update import UpdateError

pytestmark = pytest.mark.slow

# Blocks of 128 fit all but keys and values; with experts, all.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
WIDE_EXPERTS = WIDE | {"moe_intermediate_size": 256, "num_key_value_heads": 4}
BLOCKS = {"on_indivisible": "channel", "scales": "ue8m0"}
PADDED = {"vocab_size": 120}
HEAD = {"lm_head": "w8a16"}


def floats(form):
    """A checkpoint of float_llama."""

    def make(path, seed):
        state = float_llama.tensors(form, seed)
        quantization = float_llama.quantization(form)
        sizes = {"intermediate": float_llama.INTERMEDIATE}
        tiny_llama.save(path, state, quantization=quantization, **sizes)

    return make


TOKEN = tiny_llama.int8_activations()
STATIC = tiny_llama.int8_activations("asymmetric")
BYTES = {"bits": 8, "packed": False, "group": -1}
# name -> how a checkpoint is made of a seed, `--quantization`, its options
MODELS = {
    "w4a16": (quantized(tiny_llama), None),
    "w4a16 asymmetric": (quantized(tiny_llama, symmetric=False, group=64), None),
    "w8a16 channel": (quantized(tiny_llama, bits=8, group=-1), None),
    "w4a8": (quantized(tiny_llama, TOKEN, packed=False), None),
    "w8a8": (quantized(tiny_llama, TOKEN, **BYTES), None),
    "w8a8 static": (quantized(tiny_llama, STATIC, static="asymmetric", **BYTES), None),
    "w4a16 experts": (quantized(tiny_moe, symmetric=False), None),
    "w8a16 channel experts": (quantized(tiny_moe, bits=8, group=-1), None),
    "w4a8 experts": (quantized(tiny_moe, packed=False, group=-1), None),
    "w4a8 packed experts": (quantized(tiny_moe, rounded=True), None),
    "w8a8 experts": (quantized(tiny_moe, **BYTES), None),
    **{
        name: (floats(float_llama.FORMS[name]), None)
        for name in ("tensor static", "block a16", "fp8 tensor", "fp8 block", "mxfp4", "nvfp4")
    },
    "tm_w4a16": (plain("llama"), "tm_w4a16"),
    "tm_w4a16 biases": (plain("qwen2", tied=True), "tm_w4a16"),
    "tm_w4a8 experts": (plain("qwen3_moe"), "tm_w4a8"),
    "tm_w8a8 experts": (plain("qwen3_moe"), "tm_w8a8"),
    "tm_fp8": (plain("llama"), "tm_fp8"),
    "tm_fp8 experts": (plain("qwen3_moe"), "tm_fp8"),
    "tm_fp8_block": (plain("llama", sizes=WIDE), "tm_fp8_block", BLOCKS),
    "tm_fp8_block experts": (plain("qwen3_moe", sizes=WIDE_EXPERTS), "tm_fp8_block"),
    "head": (plain("llama", sizes=PADDED), None, HEAD),
    "head tied": (plain("llama", tied=True, sizes=PADDED), None, HEAD),
    "head w4a16": (quantized(tiny_llama), None, HEAD),
    "head tm_w4a16 biases": (plain("qwen2", tied=True), "tm_w4a16", HEAD),
}
UNQUANTIZED = {"bf16": (plain("llama"), None)}
WAYS = ("reload", "session")


@pytest.fixture(autouse=True)
def _patched(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # vLLM's CPU worker does the same when it is imported, which may have been in another test.
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    apply.apply()
    yield
    apply.remove()


def serve(name, folder, **options):
    """The model of that name."""
    make, method, *how = (MODELS | UNQUANTIZED)[name]
    if how:
        options = {"additional_config": {KEY: how[0]}, **options}
    return Served(make, folder, quantization=method, **options)


@pytest.mark.parametrize("name", MODELS)
def test_updates_equal_a_fresh_load(tmp_path, name):
    serve(name, tmp_path).assert_there_and_back()


@pytest.fixture(scope="module")
def served_as(tmp_path_factory):
    """served_as(name) -> the model of that name, which a refused update does not change."""
    kept = {}

    def get(name):
        if name not in kept:
            kept[name] = serve(name, tmp_path_factory.mktemp("served"))
        return kept[name]

    return get


def without(tensors, name):
    del tensors[name]


def cut(tensors, name):
    tensors[name] = tensors[name][:-8].clone()


def nan(tensors, name):
    tensors[name].view(-1)[5] = float("nan")


def infinite(tensors, name):
    tensors[name].view(-1)[5] = float("-inf")


def cast(tensors, name):
    to = torch.int32 if tensors[name].is_floating_point() else torch.float32
    tensors[name] = tensors[name].to(to)


SPOILS = {
    without: "missing in the update:\n  {}",
    cut: "{}: expected .*, shape .*, found .*, shape",
    nan: "{}: 1 of .* numbers are infinite or not a number, the first is nan at",
    infinite: "{}: 1 of .* numbers are infinite or not a number, the first is -inf at",
    cast: "{}: expected .*found torch",
}
UP, EXPERT = "model.layers.1.mlp.up_proj", "model.layers.0.mlp.experts.3.up_proj"
TABLE = "model.embed_tokens.weight"
GATE_UP = r" \(layer model.layers.1.mlp.gate_up_proj\)"
ROUTED = r" \(layer model.layers.0.mlp.experts.*\)"
# model, what is wrong with it, the tensor, what the message says behind its name
WRONG = [
    *(("w4a16", spoil, f"{UP}.weight_scale", GATE_UP) for spoil in SPOILS),
    *(("w4a16", spoil, f"{UP}.weight_packed", GATE_UP) for spoil in (without, cut, cast)),
    *(("w4a16", spoil, "model.norm.weight", "") for spoil in (without, cut, nan)),
    *(("w4a16", spoil, "lm_head.weight", "") for spoil in (without, cut)),
    *(("w8a8 static", spoil, f"{UP}.input_scale", GATE_UP) for spoil in (without, cut)),
    *(("w4a16 experts", spoil, f"{EXPERT}.weight_scale", ROUTED) for spoil in SPOILS),
    *(("w8a16 channel experts", without, f"{EXPERT}.{leaf}", ROUTED)
      for leaf in ("weight_scale", "weight_packed")),
    *(("tm_w4a16", spoil, f"{UP}.weight", GATE_UP) for spoil in SPOILS),
    ("tm_w4a16 biases", without, "model.layers.1.self_attn.k_proj.bias", ".*qkv_proj"),
    *(("tm_w8a8 experts", spoil, f"{EXPERT}.weight", ROUTED) for spoil in SPOILS),
    *(("tm_fp8_block", spoil, f"{UP}.weight", GATE_UP) for spoil in SPOILS),
    *(("tm_fp8_block experts", spoil, f"{EXPERT}.weight", ROUTED) for spoil in (without, nan)),
    *(("head", spoil, "lm_head.weight", "") for spoil in SPOILS),
    *(("head tied", spoil, TABLE, "") for spoil in SPOILS),
    *(("head tied", spoil, "model.norm.weight", "") for spoil in (without, nan)),
    *(("head w4a16", spoil, "lm_head.weight", "") for spoil in (without, cut, nan)),
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "spoil", "tensor", "layer"), WRONG)
def test_a_wrong_update_is_refused_and_changes_nothing(
    tmp_path, served_as, name, spoil, tensor, layer, way
):
    """Whatever is wrong, the message names tensor and layer, every bit is as before, and the next
    update works."""
    served = served_as(name)
    before = served.state()
    served.make(tmp_path, 1)
    (file,) = tmp_path.glob("*.safetensors")
    right = load_file(file)
    wrong = dict(right)
    spoil(wrong, tensor)
    save_file(wrong, file, metadata={"format": "pt"})
    words = f"not updated, the old ones still serve: {SPOILS[spoil].format(tensor + layer)}"
    with pytest.raises(UpdateError, match=words):
        served.update(way, tmp_path)
    served.assert_is(before)
    save_file(right, file, metadata={"format": "pt"})


def test_many_experts(tmp_path, monkeypatch):
    """Upstream counts numbers to know when a layer is complete, and counts the shape that each part
    of a fused weight brings: with many experts of few rows it would take a scale for one too many.
    """
    monkeypatch.setattr(tiny_moe, "EXPERTS", 32)
    served = serve("w8a16 channel experts", tmp_path)
    for way in WAYS:
        served.update(way, served.checkpoint(1))
        served.assert_loaded_from(tmp_path / "1")


def halves(path):
    """The tensors of a checkpoint in two files beside it."""
    (file,) = path.glob("*.safetensors")
    items = list(load_file(file).items())
    files = []
    for index, part in enumerate((items[::2], items[1::2])):
        files.append(path / f"half-{index}")
        save_file(dict(part), files[-1])
    return [str(file) for file in files]


def test_chunks_may_be_deleted_once_they_are_sent(tmp_path):
    """And until the end the old weights are those that serve."""
    served = serve("w4a16", tmp_path)
    before = served.state()
    served.worker.start_weight_update()
    for file in halves(served.checkpoint(1)):
        served.worker.update_weights({"files": [file]})
        Path(file).unlink()
        served.assert_is(before)
    served.worker.finish_weight_update()
    served.assert_loaded_from(tmp_path / "1")


@pytest.mark.parametrize("name", ["w4a16", "tm_w8a8 experts"])
def test_an_update_that_was_left_half_sent(tmp_path, served_as, name):
    """Whoever finds one open ends it, and may begin the next."""
    served = served_as(name)
    before = served.state()
    served.make(tmp_path, 1)
    served.worker.start_weight_update()
    served.worker.update_weights({"files": halves(tmp_path)[:1]})
    with pytest.raises(RuntimeError, match="already active"):
        served.worker.start_weight_update()
    served.assert_is(before)
    with pytest.raises(UpdateError, match="missing in the update"):
        served.worker.finish_weight_update()
    served.assert_is(before)
    served.update("session", served.folder / "0")
    served.assert_is(before)


@pytest.mark.parametrize(
    ("infos", "words"),
    [
        ([{"files": ["nowhere"]}], "nowhere"),
        ([{"files": "a.safetensors"}], "update_info.files is 'a.safetensors'; a list of paths"),
        ([{"files": []}], r"update_info.files is \[\]"),
        ([{"paths": ["a"]}], "paths"),
        ([{"files": ["{}"]}, {"files": ["{}"]}], "was sent before"),
        ([{"files": ["{}.cut"]}], "truncated"),
    ],
)
def test_what_cannot_be_sent(served_as, infos, words):
    """The update ends with it, and the next one may begin."""
    served = served_as("w4a16")
    (file,) = (served.folder / "0").glob("*.safetensors")
    file.with_suffix(".safetensors.cut").write_bytes(file.read_bytes()[:-100])

    def send(info):
        files = info.get("files")
        if isinstance(files, list):
            info = {"files": [name.format(file) for name in files]}
        served.worker.update_weights(info)

    served.worker.start_weight_update()
    *sent, wrong = infos
    for info in sent:
        send(info)
    with pytest.raises(UpdateError, match=words):
        send(wrong)
    assert not served.engine._files, "what was sent before stays open"
    before = served.state()
    served.update("session", served.folder / "0")
    served.assert_is(before)


def test_what_only_the_kernel_can_refuse(tmp_path, served_as):
    """Layers before it have their new weights by then."""
    served = served_as("w4a8")
    before = served.state()
    served.make(tmp_path, 1)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 100
    save_file(tensors, file)
    for way in WAYS:
        with pytest.raises(
            UpdateError, match=r"layers.1.mlp.gate_up_proj.weight: values of .* 100"
        ):
            served.update(way, tmp_path)
        served.assert_is(before)


@pytest.mark.parametrize("error", [OSError("the disk is gone"), KeyboardInterrupt()])
def test_an_interruption_while_the_weights_are_read(tmp_path, served_as, error):
    """Wherever it comes."""
    served = served_as("tm_w4a16")
    before = served.state()
    served.make(tmp_path, 1)
    tensors = load_file(tmp_path / "model.safetensors")

    def interrupted(after):
        yield from list(tensors.items())[:after]
        raise error

    expected = UpdateError if isinstance(error, Exception) else type(error)
    for after in (0, 1, len(tensors) // 2, len(tensors)):
        with pytest.raises(expected, match=str(error)):
            served.worker.reload_weights(weights_iterator=interrupted(after))
        served.assert_is(before)
    served.worker.reload_weights(weights_iterator=iter(tensors.items()))
    assert not same(served.model.lm_head.weight, before["lm_head.weight"][2])
    served.update("reload", served.folder / "0")
    served.assert_is(before)


def test_a_refused_path_is_forgotten(tmp_path, served_as):
    """A reload without a path takes the last one that served."""
    served = served_as("w4a16")
    before = served.state()
    with pytest.raises(UpdateError):
        served.update("reload", tmp_path / "nowhere")
    served.worker.reload_weights()
    served.assert_is(before)


def test_another_worker_refuses(tmp_path, served_as, monkeypatch):
    """All workers of a model have the same weights."""
    served = served_as("w4a16")
    before = served.state()
    served.make(tmp_path, 1)

    def refuse(_reason, cause):
        raise UpdateError("another's reason") from cause

    monkeypatch.setattr(updates, "refuse_together", refuse)
    with pytest.raises(UpdateError, match="another's reason"):
        served.update("session", tmp_path)
    served.assert_is(before)


def test_a_model_that_began_with_dummy_weights(tmp_path):
    """There are no names to compare with, but layers of ours know what they wait for."""
    served = serve("w4a16", tmp_path, load_format="dummy")
    before = served.state()
    served.worker.start_weight_update()
    served.worker.update_weights({"files": halves(served.checkpoint(1))[:1]})
    with pytest.raises(UpdateError, match=r"missing in the update:\n  layer model.layers.0"):
        served.worker.finish_weight_update()
    served.assert_is(before)
    served.update("session", tmp_path / "1")
    served.options["load_format"] = "auto"
    served.assert_loaded_from(tmp_path / "1")


@pytest.mark.parametrize("name", ["head", "head tied"])
def test_a_head_that_began_with_dummy_weights(tmp_path, name):
    """Rows that pad the vocabulary never come, and are not waited for."""
    served = serve(name, tmp_path, load_format="dummy")
    served.update("session", served.checkpoint(1))
    served.options["load_format"] = "auto"
    served.assert_loaded_from(tmp_path / "1")


@pytest.mark.parametrize("name", ["tm_w4a16 biases", "head tied"])
def test_tied_weights_need_not_come_twice(tmp_path, name):
    """A checkpoint may have a tied head, a trainer does not."""
    served = serve(name, tmp_path)
    path = served.checkpoint(1)
    file = path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    served.update("session", path)
    save_file(tensors, file)
    served.update("session", path)
    served.assert_loaded_from(path)


def test_models_without_a_layer_of_ours_are_upstreams(tmp_path):
    """Which lets a part of the weights be updated."""
    served = serve("bf16", tmp_path)
    file = served.checkpoint(1) / "model.safetensors"
    tensors = load_file(file)
    before = served.state()
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    served.update("reload", tmp_path / "1")
    assert same(served.model.model.norm.weight, before["model.norm.weight"][2])
    assert not same(served.model.lm_head.weight, before["lm_head.weight"][2])


def test_twenty_updates_keep_memory_flat(tmp_path, monkeypatch):
    """By both ways in turn; the first ones fill the caches of the allocator."""
    monkeypatch.setitem(SIZES, "hidden_size", 512)
    monkeypatch.setitem(SIZES, "intermediate_size", 1024)
    served = serve("tm_w4a16", tmp_path)
    for way in WAYS * 2:
        served.update(way, tmp_path / "0")
    before = resident()
    for way in WAYS * 10:
        served.update(way, tmp_path / "0")
    # The weights take 3 MB; twenty copies of them, or of their backup, would hold 60.
    assert resident() - before < 16e6


def resident():
    gc.collect()
    with open("/proc/self/status") as status:
        return int(re.search(r"VmRSS:\s+(\d+)", status.read())[1]) * 1024


def test_the_backup_takes_one_copy_of_the_weights(tmp_path):
    """Tied weights, and what shares memory with them, once."""
    served = serve("tm_w4a16 biases", tmp_path)
    tensors = [*served.model.parameters(), *served.model.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    backup = Backup(served.model)
    kept = [copy.nbytes for _, copy in backup._bytes.values()]
    assert sum(kept) == sum(storage.nbytes() for storage in storages.values())
    state = served.state()
    for tensor in tensors:
        tensor.data.zero_()
    backup.restore()
    served.assert_is(state)
