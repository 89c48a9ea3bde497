# SPDX-License-Identifier: Apache-2.0
"""A Qwen3.5 as it is published: beside a vision tower, its modules under model.language_model."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tools import make_model

_RECIPE = 1
_VISION = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "num_position_embeddings": 64,
}
# model_type of the text -> that of both, and their class
_WHOLE = {
    "qwen3_5_text": ("qwen3_5", "Qwen3_5ForConditionalGeneration"),
    "qwen3_5_moe_text": ("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration"),
}


def wrapped(text: Path) -> Path:
    """The text model `text` with a seeded vision tower, beside it; made once."""
    config = json.loads((text / "config.json").read_text())
    quantization = config.pop("quantization_config")
    kept = "modules_to_not_convert" if "modules_to_not_convert" in quantization else "ignore"
    quantization[kept] = [*quantization[kept], "re:.*visual.*" if kept == "ignore" else "visual"]
    model_type, architecture = _WHOLE[config["model_type"]]
    whole = {
        "architectures": [architecture],
        "model_type": model_type,
        "text_config": config,
        "vision_config": {**_VISION, "out_hidden_size": config["hidden_size"]},
        "tie_word_embeddings": config["tie_word_embeddings"],
        "quantization_config": quantization,
    }

    def write(target: Path) -> None:
        state = {
            name.replace("model.", "model.language_model.", 1)
            if name.startswith("model.")
            else name: tensor
            for name, tensor in load_file(text / make_model.WEIGHTS).items()
        }
        state |= {f"model.visual.{name}": tensor for name, tensor in _tower(whole).items()}
        save_file(state, target / make_model.WEIGHTS, metadata={"format": "pt"})
        (target / "config.json").write_text(json.dumps(whole))

    recipe = {"recipe": _RECIPE, "config": whole}
    return make_model.make_once(text.with_name(f"{text.name}-wrapped"), recipe, write)


def _tower(config: dict[str, object]) -> dict[str, torch.Tensor]:
    from transformers import AutoConfig, AutoModel

    parts = {"vision_config": config["vision_config"], "text_config": config["text_config"]}
    vision = AutoConfig.for_model(config["model_type"], **parts).vision_config
    torch.manual_seed(0)
    return AutoModel.from_config(vision).bfloat16().state_dict()
