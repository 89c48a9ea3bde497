# SPDX-License-Identifier: Apache-2.0
"""Writes AWQ and GPTQ checkpoints by AutoRound, in whose environment it runs.

Usage: auto_round_writer.py JOBS.json. Each job: `plain`, a checkpoint's folder; `target`, a folder
to make, with the quantized checkpoint in `packed` and in `numbers` the same weights as AutoRound
itself dequantizes them; `format`, "auto_awq" or "auto_gptq"; `bits`, `group_size`, `symmetric`.
Weights are rounded to nearest: that takes no text, hence no network.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def write(job: dict[str, Any]) -> None:
    """One checkpoint, both ways."""
    target = Path(job["target"])
    model = AutoModelForCausalLM.from_pretrained(job["plain"], dtype=torch.float32)
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    rounding = AutoRound(
        model,
        tokenizer,
        bits=job["bits"],
        group_size=job["group_size"],
        sym=job["symmetric"],
        iters=0,
        disable_opt_rtn=True,
        device_map="cpu",
    )
    made = target / "made"
    # "fake" first: the other replaces the model's layers by packed ones.
    rounding.quantize_and_save(str(made), format=f"fake,{job['format']}")
    (fake,) = made.rglob("fake")
    (packed,) = made.rglob(job["format"].replace("_", "-"))
    fake.rename(target / "numbers")
    packed.rename(target / "packed")
    shutil.rmtree(made)


if __name__ == "__main__":
    for one in json.loads(Path(sys.argv[1]).read_text()):
        write(one)
