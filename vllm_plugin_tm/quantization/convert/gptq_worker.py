# SPDX-License-Identifier: Apache-2.0
"""What runs in llm-compressor's own environment: one request in, one answer out, both JSON.

Imports nothing of this package, which that environment need not have.
"""

import json
import sys

REFUSED = "refused: "
"""What stands before a reason that is the user's to mend."""


def main() -> int:
    """Reads the request from standard input; the answer is the last line of standard output."""
    request = json.load(sys.stdin)
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(request["source"])
    with open(request["text"], encoding="utf-8") as file:
        tokens = tokenizer(file.read(), add_special_tokens=False)["input_ids"]
    samples, length = request["samples"], request["length"]
    if len(tokens) < samples * length:
        sys.stdout.write(
            f"{REFUSED}{request['text']} has {len(tokens):,} tokens, but {samples} samples of "
            f"{length} need {samples * length:,}; give a longer text, fewer or shorter samples\n"
        )
        return 1
    rows = [tokens[i * length : (i + 1) * length] for i in range(samples)]
    model = AutoModelForCausalLM.from_pretrained(request["source"], dtype="auto")
    quantization = request["quantization"]
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * length] * samples}),
        recipe=GPTQModifier(
            config_groups=quantization["config_groups"],
            ignore=quantization["ignore"],
            actorder=None,  # groups of neighbours: what every reader of the format can run
        ),
        num_calibration_samples=samples,
        max_seq_length=length,
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(request["destination"], save_compressed=True)
    sys.stdout.write(json.dumps({"peak_bytes": resident("VmHWM")}) + "\n")
    return 0


def resident(field: str) -> int:
    """Bytes of this process in memory: now ("VmRSS"), or at most so far ("VmHWM"). Not getrusage's,
    which in a child begins with what its parent held when it was forked."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


if __name__ == "__main__":
    sys.exit(main())
