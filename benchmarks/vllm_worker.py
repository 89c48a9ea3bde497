# SPDX-License-Identifier: Apache-2.0
"""A worker with vLLM's offline engine and made-up weights: vllm_worker.py DIRECTORY ARGUMENTS.

DIRECTORY is a checkpoint, of which config.json is enough; ARGUMENTS are more of vllm.LLM's, as
JSON.
"""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import workers

from vllm_plugin_tm.bench import amx

if amx.is_hidden():  # in this process too, and, where they import this file, in its children
    amx.hide()


def load() -> Callable[[int, int], None]:
    """Loads the checkpoint directory that the command line names."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=sys.argv[1],
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=1,
        enable_prefix_caching=False,
        generation_config="vllm",
        **json.loads(sys.argv[2]),
    )
    vocabulary = json.loads((Path(sys.argv[1]) / "config.json").read_text())["vocab_size"]
    tokens = random.Random(0)

    def generate(prompt_tokens: int, new_tokens: int) -> None:
        prompt = [tokens.randrange(3, vocabulary) for _ in range(prompt_tokens)]
        sampling = SamplingParams(
            temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        (answer,) = engine.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
        made = len(answer.outputs[0].token_ids)
        if made != new_tokens:
            raise RuntimeError(f"asked for {new_tokens} tokens, vLLM made {made}")

    return generate


if __name__ == "__main__":  # vLLM starts processes that import this file again
    workers.serve(load)
