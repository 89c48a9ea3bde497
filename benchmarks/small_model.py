# SPDX-License-Identifier: Apache-2.0
"""A language model trained here from nothing, in minutes: its weights never were quantized, as
those of the models that packages bring were."""

import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4096
LENGTH = 256
BATCH = 8
STEPS = 600
RATE = 1.5e-3
WARM_UP = 50


def trained(folder: Path, text: str) -> Path:
    """Trains on `text` unless `folder` is there: eleven million weights, bf16 when saved."""
    if (folder / "config.json").is_file():
        return folder
    torch.manual_seed(0)
    tokenizer = _tokenizer(text)
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    config = LlamaConfig(
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=STEPS, pct_start=WARM_UP / STEPS
    )
    generator = torch.Generator().manual_seed(0)
    start = time.monotonic()
    for step in range(STEPS):
        at = torch.randint(len(tokens) - LENGTH, (BATCH,), generator=generator)
        batch = torch.stack([tokens[i : i + LENGTH] for i in at])
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(
                f"    step {step}: {loss.item():.3f} ({time.monotonic() - start:.0f} s)", flush=True
            )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte pairs of the text's own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
