# SPDX-License-Identifier: Apache-2.0
"""Which tensors of real checkpoints are quantized: golden lists, patterns, what runs as one."""

import convert_cases as cases
import pytest
from golden_names import MODELS, lines

from vllm_plugin_tm.quantization.convert import ConvertError, Options
from vllm_plugin_tm.quantization.convert.checkpoint import open_checkpoint
from vllm_plugin_tm.quantization.convert.plan import make_plan
from vllm_plugin_tm.quantization.convert.selection import select


def planned(folder, **options):
    return make_plan(open_checkpoint(folder), Options("w4a16", **options))


@pytest.mark.parametrize("name", MODELS)
def test_golden_names(tmp_path, name):
    plan = planned(cases.make(tmp_path / name, name))
    expected_kept, expected_quantized = {}, set()
    for tensor, shape, what in lines(MODELS[name][0]):
        module = tensor.removesuffix(".weight")
        if what == "quantized":
            expected_quantized.add(module)
        elif what == "experts":
            parent, _, leaf = module.rpartition(".")
            parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
            expected_quantized |= {f"{parent}.{e}.{p}" for e in range(shape[0]) for p in parts}
        elif what != "-":
            expected_kept[module] = what
    assert set(plan.quantized) == expected_quantized
    assert plan.kept == expected_kept


def test_the_head_is_quantized_when_asked(tmp_path):
    folder = cases.make(tmp_path / "m")
    assert "lm_head" in planned(folder, lm_head=True).quantized
    assert "lm_head" not in planned(folder).quantized


def test_a_tied_head_cannot_be_asked_for(tmp_path):
    folder = cases.make(tmp_path / "m", "gemma3")
    with pytest.raises(ConvertError, match="tied to the embedding"):
        planned(folder, lm_head=True)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("deepseek_v3", "model.layers.2.mlp.experts.0.up_proj"),
        ("qwen3_5", "mtp.layers.0.self_attn.q_proj"),
    ],
)
def test_prediction_heads_are_quantized_when_asked(tmp_path, name, head):
    folder = cases.make(tmp_path / "m", name)
    asked = planned(folder, mtp=True)
    assert head in asked.quantized
    # Their routers, embeddings, heads and entries still are none of it.
    assert not any("gate." in f"{n}." or "embed" in n or "head" in n for n in asked.quantized)
    assert head not in planned(folder).quantized


def test_ignored_modules_stay_and_say_so(tmp_path):
    folder = cases.make(tmp_path / "m")
    plan = planned(folder, ignore=("re:.*down_proj$", "model.layers.0.self_attn.o_proj"))
    assert plan.kept["model.layers.0.mlp.down_proj"] == "ignored, as asked"
    assert plan.kept["model.layers.0.self_attn.o_proj"] == "ignored, as asked"
    assert "model.layers.0.mlp.up_proj" in plan.quantized


def test_targets_replace_the_default(tmp_path):
    folder = cases.make(tmp_path / "m")
    plan = planned(folder, targets=("re:.*mlp.*", "lm_head"))
    assert set(plan.quantized) == {
        *(f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")),
        "lm_head",
    }
    assert plan.kept["model.layers.0.self_attn.q_proj"] == "not among the targets, as asked"


@pytest.mark.parametrize("option", ["ignore", "targets"])
def test_a_pattern_that_matches_nothing_is_a_mistake(tmp_path, option):
    folder = cases.make(tmp_path / "m")
    with pytest.raises(ConvertError, match=rf"{option} pattern 're:.*down_prj' matches no module"):
        planned(folder, **{option: ("re:.*down_prj",)})


@pytest.mark.parametrize(
    ("name", "pattern", "one", "other"),
    [
        ("llama", "re:.*q_proj$", "k_proj", "q_proj"),
        ("llama", "re:.*up_proj$", "gate_proj", "up_proj"),
        ("mixtral", "re:.*w3$", "w1", "w3"),
        ("mixtral", "re:.*w2$", "w1", "w2"),
        ("qwen3_moe", "re:.*experts.1.*", "experts.0", "experts.1"),
        ("deepseek_v3", "re:.*0.self_attn.kv_a_proj_with_mqa$", "q_a_proj", "kv_a_proj_with_mqa"),
        ("qwen3_5", "re:.*in_proj_z$", "in_proj_qkv", "in_proj_z"),
    ],
)
def test_what_vllm_runs_as_one_is_quantized_alike(tmp_path, name, pattern, one, other):
    folder = cases.make(tmp_path / "m", name)
    with pytest.raises(ConvertError) as caught:
        planned(folder, ignore=(pattern,))
    message = str(caught.value)
    quantized, _, rest = message.partition(" would be quantized and ")
    assert one in quantized
    assert other in rest.split(" would not ")[0]
    assert "quantize both or neither" in message


def test_nothing_left_is_an_error(tmp_path):
    folder = cases.make(tmp_path / "m")
    with pytest.raises(ConvertError, match="nothing is left to quantize"):
        planned(folder, ignore=("re:.*layers.*",))


@pytest.mark.parametrize("leaf", ["c_attn", "dense", "fc_in", "wqkv", "query_key_value"])
def test_attention_of_other_names_is_known_by_its_place(leaf):
    name = f"transformer.h.3.attn.{leaf}"
    assert select([name], Options("w4a16")).quantized == (name,)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.per_layer_input_gate", "model.layers.0.altup.correction_coefs",
        "model.layers.0.laurel.linear_left", "score", "model.mm_projector.0", "transformer.wpe",
        "backbone.layers.0.mixer.conv1d", "backbone.layers.0.mixer.x_proj",
        "model.layers.0.self_attn.indexer.wq_b", "somewhere.linear",
    ],
)  # fmt: skip
def test_what_is_not_known_to_be_a_projection_stays(name):
    other = "model.layers.0.mlp.fc1"
    choice = select([name, other], Options("w4a16"))
    assert choice.quantized == (other,)
