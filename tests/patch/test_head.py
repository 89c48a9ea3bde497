# SPDX-License-Identifier: Apache-2.0
"""The output head quantized while loading: the converter's bits whatever the rest of the model is,
tied heads, loading again, and what is refused."""

import json
from types import SimpleNamespace

import packed_llama
import pytest
import tiny_llama
import torch
from safetensors.torch import load_file, save_file

from vllm_plugin_tm.kernels import ops

pytest.importorskip("vllm")
if not ops.is_available():
    pytest.skip("the extension is not built", allow_module_level=True)

from transformers import AutoConfig, AutoModelForCausalLM
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import inplace

from vllm_plugin_tm import layer_table
from vllm_plugin_tm.patch import apply
from vllm_plugin_tm.quantization.convert import Options, convert
from vllm_plugin_tm.quantization.online.head import quantize_head
from vllm_plugin_tm.quantization.online.options import KEY, OnlineError

pytestmark = pytest.mark.slow

HIDDEN, VOCABULARY = 128, 256
SIZES = {
    "hidden_size": HIDDEN, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "vocab_size": VOCABULARY, "initializer_range": 0.1,
}  # fmt: skip
HEAD = {KEY: {"lm_head": "w8a16"}}
NOTE = "lm_head w8a16, quantized while loading"
TABLE = "model.embed_tokens.weight"
LEAVES = ("weight_packed", "weight_scale")


@pytest.fixture(autouse=True)
def _patched(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    apply.apply()
    yield
    apply.remove()


def make(folder, architecture="llama", tied=False, seed=0, **changes):
    """A seeded bf16 checkpoint of transformers' own saving."""
    torch.manual_seed(seed)
    sizes = SIZES | changes
    config = AutoConfig.for_model(architecture, **sizes, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    return folder


def awq(folder):
    state = packed_llama.converted(tiny_llama.tensors(symmetric=False), packed_llama.awq_tensors)
    tiny_llama.save(folder, state, quantization=packed_llama.awq(32))


def gptq(folder):
    state = packed_llama.converted(tiny_llama.tensors(), packed_llama.gptq_tensors)
    tiny_llama.save(folder, state, quantization=packed_llama.gptq(4, 32))


def scheme(options, **how):
    """A checkpoint of the converter's, whose head stays."""

    def write(folder):
        plain = make(folder.with_name(f"{folder.name}-plain"), **how)
        convert(plain, folder, options)

    return write


def plain(**how):
    return lambda folder: make(folder, **how)


# name -> how the checkpoint is written, the engine's options, the module that has the copy
MODELS = {
    "bf16": (plain(), {}, "lm_head"),
    "bf16 tied": (plain(tied=True), {}, "model.embed_tokens"),
    "bf16 embedding is the head": (
        plain(architecture="gemma2", tied=True, query_pre_attn_scalar=32),
        {"dtype": "bfloat16"},
        "model.embed_tokens",
    ),
    "w4a16": (scheme(Options("w4a16")), {}, "lm_head"),
    "w4a16 tied": (scheme(Options("w4a16"), tied=True), {}, "model.embed_tokens"),
    "fp8": (scheme(Options("fp8")), {}, "lm_head"),
    "awq": (awq, {"dtype": "bfloat16"}, "lm_head"),
    "gptq": (gptq, {"dtype": "bfloat16"}, "lm_head"),
    "tm_w4a16": (plain(), {"quantization": "tm_w4a16"}, "lm_head"),
    "tm_w8a8 tied": (plain(tied=True), {"quantization": "tm_w8a8"}, "model.embed_tokens"),
}


def load(path, **options):
    return tiny_llama.load(path, additional_config=HEAD, **options)


def logits(model, x):
    return model.compute_logits(x)


def head_weight(path):
    """What logits are made with, as the checkpoint has it."""
    tensors = load_file(path / "model.safetensors")
    return tensors.get("lm_head.weight", tensors[TABLE])


def converted_head(folder, weight, group_size=32):
    """The kernel tensors of a head with these weights from a checkpoint of the converter's."""
    rows, columns = weight.shape
    bare = make(folder / "bare", vocab_size=rows, hidden_size=columns)
    tensors = load_file(bare / "model.safetensors")
    tensors["lm_head.weight"] = weight.contiguous()
    save_file(tensors, bare / "model.safetensors", metadata={"format": "pt"})
    convert(bare, folder / "made", Options("w8a16", group_size, lm_head=True))
    model = tiny_llama.load(folder / "made")
    return [getattr(model.lm_head, leaf).data for leaf in LEAVES]


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", MODELS)
def test_the_head_is_the_converters(tmp_path, name):
    """Bit for bit; the table names it, and has a note for nothing else that was not there before;
    tokens are looked up in the table that was loaded."""
    write, options, owner = MODELS[name]
    write(tmp_path / "model")
    tiny_llama.load(tmp_path / "model", **options)
    before = [row for row in layer_table.last() if row.on_tm]
    model = load(tmp_path / "model", **options)
    rows = [row for row in layer_table.last() if row.on_tm]
    (row,) = [row for row in rows if row.note == NOTE]
    assert [each for each in rows if each != row] == before
    assert (row.count, row.kernel, row.group_size) == (1, "TMWNA16LinearKernel", 32)
    assert row.example == ("lm_head" if hasattr(model, "lm_head") else owner)

    module = model.get_submodule(owner)
    weight = head_weight(tmp_path / "model")
    expected = converted_head(tmp_path, weight)
    for leaf, tensor in zip(LEAVES, expected, strict=True):
        assert torch.equal(bits(getattr(module, leaf).data), bits(tensor)), leaf
    # A head has no use for its 16 bits any more; a table has.
    assert hasattr(module, "weight") == (owner != "lm_head")
    ids = torch.tensor([[0, 7, VOCABULARY - 1]])
    table = load_file(tmp_path / "model" / "model.safetensors")[TABLE]
    assert torch.equal(model.model.embed_tokens(ids), table[ids])


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_weights(tmp_path, name):
    """Weights of 8 bits in groups of 32: each is off by at most half of 1/127.5 of its group's
    largest, some 0.5 % in norm of the product. Gemma caps logits."""
    write, options, _ = MODELS[name]
    write(tmp_path / "model")
    model = load(tmp_path / "model", **options)
    x = torch.randn(5, HIDDEN).bfloat16()
    want = x.double() @ head_weight(tmp_path / "model").double().T
    cap = getattr(model.logits_processor, "soft_cap", None)
    if cap:
        want = (want / cap).tanh() * cap
    got = logits(model, x).double()
    assert got.shape == want.shape
    assert 1e-4 < float((got - want).norm() / want.norm()) < 8e-3


@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_pad_the_vocabulary_are_zero(tmp_path, tied):
    """vLLM pads 250 to 256; a bias is added to them as to others."""
    model = load(make(tmp_path / "model", tied=tied, vocab_size=250))
    x = torch.randn(3, HIDDEN).bfloat16()
    head = model.lm_head
    assert torch.equal(
        head.quant_method.apply(head, x, None)[:, 250:], torch.zeros(3, 6).bfloat16()
    )
    assert logits(model, x).shape == (3, 250)
    bias = torch.randn(256).bfloat16()
    got = head.quant_method.apply(head, x, bias=bias).float()
    want = head.quant_method.apply(head, x).float() + bias.float()
    # Both are rounded to bf16 once, here of the sum and there of the product.
    torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-8 * float(want.abs().max()))


def test_a_head_with_a_bias_of_its_own(tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model("phi", **SIZES, tie_word_embeddings=False)
    reference = AutoModelForCausalLM.from_config(config).bfloat16()
    torch.nn.init.normal_(reference.lm_head.bias)
    reference.save_pretrained(tmp_path)
    model = load(tmp_path)
    x = torch.randn(4, HIDDEN).bfloat16()
    want = reference.double().lm_head(x.double())
    got = model.compute_logits(x).double()
    assert float((got - want).norm() / want.norm()) < 8e-3
    assert any(row.note == NOTE for row in layer_table.last())


def test_groups_that_do_not_fit_are_channels(tmp_path):
    weights = make(tmp_path / "model", hidden_size=120, num_attention_heads=4, head_dim=30)
    model = load(weights)
    (row,) = [row for row in layer_table.last() if row.on_tm]
    assert (row.group_size, row.note) == (-1, NOTE)
    assert model.lm_head.weight_scale.numel() == VOCABULARY


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_activations(tmp_path, dtype):
    """A float32 model's scales are those of the checkpoint's own type."""
    model = load(make(tmp_path / "model"), dtype=dtype)
    x = torch.randn(3, HIDDEN, dtype=getattr(torch, dtype))
    want = x.double() @ head_weight(tmp_path / "model").double().T
    got = logits(model, x)
    assert got.dtype == x.dtype
    assert float((got.double() - want).norm() / want.norm()) < 8e-3
    if dtype == "float32":
        scales = model.lm_head.weight_scale
        assert torch.equal(scales, scales.bfloat16().float())


def test_a_tied_model_with_a_head_in_its_checkpoint(tmp_path):
    """vLLM unties them for loading, and ties them again where they are alike: not this head."""
    path = make(tmp_path / "model", tied=True)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors[TABLE].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    model = load(path)
    x = torch.randn(3, HIDDEN).bfloat16()
    expected = load(make(tmp_path / "tied", tied=True))
    assert torch.equal(logits(model, x), logits(expected, x))


@pytest.mark.parametrize("tied", [False, True])
def test_a_row_does_not_depend_on_the_others(tmp_path, tied):
    model = load(make(tmp_path / "model", tied=tied))
    x = torch.randn(9, HIDDEN).bfloat16()
    together = logits(model, x)
    for index in (0, 4, 8):
        assert torch.equal(logits(model, x[index : index + 1])[0], together[index])


@pytest.mark.parametrize("tied", [False, True])
def test_compiled_without_a_graph_break(tmp_path, tied):
    """One graph for any number of tokens, of the look-up and of the product."""
    model = load(make(tmp_path / "model", tied=tied))

    def both(ids):
        rows = model.model.embed_tokens(ids)
        return rows, model.lm_head.quant_method.apply(model.lm_head, rows)

    compiled = torch.compile(both, fullgraph=True, backend="eager", dynamic=True)
    for count in (4, 9, 2):
        ids = torch.arange(count) * 11
        for got, want in zip(compiled(ids), both(ids), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("architecture", "tied"), [("llama", False), ("llama", True), ("gemma2", True)]
)
def test_loading_again(tmp_path, architecture, tied):
    """With a padded vocabulary: a fresh load's bits, in the same memory, of table and copy."""
    how = {"architecture": architecture, "tied": tied, "vocab_size": 250}
    options = {"additional_config": HEAD, "dtype": "bfloat16"}
    paths = [make(tmp_path / str(seed), seed=seed, **how) for seed in (0, 1)]
    model = tiny_llama.load(paths[0], **options)
    places = {name: param.data_ptr() for name, param in model.named_parameters()}
    config = tiny_llama.engine_config(paths[0], **options)
    for path in (paths[1], paths[0]):
        fresh = dict(tiny_llama.load(path, **options).named_parameters())
        with set_current_vllm_config(config):
            inplace.reload_weights(config, model, None, str(path), True)
        now = dict(model.named_parameters())
        assert {name: param.data_ptr() for name, param in now.items()} == places
        assert set(now) == set(fresh)
        for name, param in fresh.items():
            assert torch.equal(bits(now[name].data), bits(param.data)), name
    assert any(name.endswith("weight_packed") for name in places)


@pytest.mark.parametrize("name", ["bf16", "w4a16", "w4a16 tied", "tm_w4a16"])
def test_a_missing_head_is_refused_by_name(tmp_path, name):
    write, options, owner = MODELS[name]
    write(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"{owner}.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{owner}.weight"):
        load(tmp_path / "model", **options)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, tied):
    path = make(tmp_path / "model", tied=tied)
    tensors = load_file(path / "model.safetensors")
    name = "model.embed_tokens" if tied else "lm_head"
    tensors[f"{name}.weight"][3, 5] = float("nan")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name}: the weight is nan at output row 3, input 5"):
        load(path)


@pytest.mark.parametrize("tied", [False, True])
def test_dummy_weights_load_too(tmp_path, tied):
    path = make(tmp_path / "model", tied=tied)
    (path / "model.safetensors").unlink()
    model = load(path, load_format="dummy")
    assert torch.isfinite(logits(model, torch.ones(2, HIDDEN).bfloat16())).all()


@pytest.mark.parametrize("quantization", [None, "tm_w4a16"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        *(
            (
                {"lm_head": value},
                rf"^--additional-config tm_online.lm_head is {value!r}; allowed is w8a16$",
            )
            for value in ("w4a16", "W8A16", "", True, None, 8)
        ),
        ({"lm-head": "w8a16"}, r"'lm-head' \('w8a16'\), which is not known; .* lm_head"),
    ],
)
def test_wrong_values_are_refused_before_a_weight_is_read(
    tmp_path, options, words, quantization, monkeypatch
):
    refuse_to_read(monkeypatch)
    path = make(tmp_path / "model")
    with pytest.raises(ValueError, match=words):
        tiny_llama.load(path, quantization=quantization, additional_config={KEY: options})


def refuse_to_read(monkeypatch):
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    def must_not(*_args, **_kwargs):
        raise AssertionError("it read weights")

    monkeypatch.setattr(DefaultModelLoader, "load_weights", must_not)


def test_other_options_still_need_a_method(tmp_path):
    path = make(tmp_path / "model")
    options = {"lm_head": "w8a16", "group_size": 64}
    with pytest.raises(OnlineError, match=r"is None; .*except lm_head, which may stand alone"):
        tiny_llama.load(path, additional_config={KEY: options})


def test_a_head_that_is_quantized_already_is_refused(tmp_path, monkeypatch):
    refuse_to_read(monkeypatch)
    plain = make(tmp_path / "plain")
    convert(plain, tmp_path / "made", Options("w4a16", lm_head=True))
    words = r"lm_head of this checkpoint is quantized already \(CompressedTensorsWNA16\)"
    with pytest.raises(OnlineError, match=words):
        load(tmp_path / "made")


def test_a_model_without_a_head_is_refused(tmp_path, monkeypatch):
    refuse_to_read(monkeypatch)
    path = make(tmp_path / "model")
    with pytest.raises(OnlineError, match=r"\(runner pooling\) has no output head"):
        load(path, runner="pooling")


def test_another_type_of_logits_is_refused(tmp_path, monkeypatch):
    refuse_to_read(monkeypatch)
    path = make(tmp_path / "model")
    with pytest.raises(OnlineError, match=r"head_dtype is torch.float32 and the model's dtype"):
        load(path, hf_overrides={"head_dtype": "float32"})


def test_adapters_want_a_head_of_16_bits(tmp_path, monkeypatch):
    """vLLM's code for them reads the head's `weight`; that of a tied head is the table."""
    words = "--enable-lora asks lm_head for weights of 16 bits"
    tied = load(make(tmp_path / "tied", tied=True), enable_lora=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    refuse_to_read(monkeypatch)
    with pytest.raises(OnlineError, match=words):
        load(make(tmp_path / "model"), enable_lora=True)


def test_a_scheme_that_is_left_out_is_refused(tmp_path, monkeypatch):
    refuse_to_read(monkeypatch)
    monkeypatch.setenv("VLLM_PLUGIN_TM_SCHEMES", "w4a16")
    path = make(tmp_path / "model")
    with pytest.raises(OnlineError, match=r"(?s)lm_head is 'w8a16'.*not among the schemes to take"):
        load(path)


def test_a_loader_that_is_not_ours_is_refused(tmp_path, monkeypatch):
    """The worker asks once the model is there."""
    from vllm.v1.worker import cpu_worker
    from vllm.v1.worker.gpu_worker import Worker

    path = make(tmp_path / "model")
    config = tiny_llama.engine_config(path, additional_config=HEAD)
    one = object.__new__(cpu_worker.CPUWorker)
    monkeypatch.setattr(Worker, "load_model", lambda *_args, **_options: None)
    for options, refused in (({}, True), ({"additional_config": HEAD}, False)):
        model = tiny_llama.load(path, **options)
        runner = SimpleNamespace(get_model=lambda model=model: model)
        one.__dict__.update(vllm_config=config, model_runner=runner)
        if refused:
            with pytest.raises(OnlineError, match="--load-format auto left the head as it was"):
                one.load_model()
        else:
            one.load_model()


def test_a_draft_models_head_is_left(tmp_path):
    """Its head may be taken from the model that it drafts for, by comparing their weights."""
    model = tiny_llama.load(make(tmp_path / "model"))
    method = model.lm_head.quant_method
    config = SimpleNamespace(additional_config=HEAD)
    quantize_head(model, config, SimpleNamespace(runner_type="draft"))
    assert model.lm_head.quant_method is method


def test_without_the_option_nothing_changes(tmp_path):
    model = tiny_llama.load(make(tmp_path / "model", tied=True))
    assert type(model.lm_head.quant_method).__name__ == "UnquantizedEmbeddingMethod"
    assert not any(row.on_tm for row in layer_table.last())


def test_the_option_is_json():
    assert json.loads(json.dumps(HEAD)) == HEAD
