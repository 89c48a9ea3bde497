# SPDX-License-Identifier: Apache-2.0
"""What conversion costs in quality: perplexity and divergence from bf16 on a fixed text, for every
scheme, group size and method. Run as `python -m benchmarks.quality`; see docs/conversion.md."""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks import small_model
from tools import layout, make_model
from vllm_plugin_tm.quantization.convert import ConvertError, Options, convert

WINDOW = 512
GPTQ_SAMPLES = 64


@dataclass(frozen=True)
class Figure:
    """One conversion of one model: `perplexity`, `divergence` (Kullback-Leibler, of the converted
    model's next-token distribution from bf16's, nats a token), `agreement` (same first choice)."""

    model: str
    scheme: str
    group: str
    method: str
    perplexity: float
    divergence: float
    agreement: float
    bytes: int


def variants(calibration: str | None, python: str | None) -> Iterator[Options]:
    """What is compared."""
    for group in (32, 64, 128, -1):
        for method in ("rtn", "signed", "mse"):
            yield Options("w4a16", group, method=method)
        for method in ("rtn", "mse"):
            yield Options("w4a16", group, symmetric=False, method=method)
        if python and group in (32, 128):
            yield Options(
                "w4a16",
                group,
                method="gptq",
                calibration=calibration,
                calibration_python=python,
                calibration_samples=GPTQ_SAMPLES,
            )
    yield Options("w4a16", 32, method="mse", mse_weight="square")
    yield Options("w8a16", 32)
    yield Options("w4a8", 32)
    yield Options("w4a8", 32, method="mse")
    yield Options("w8a8")
    yield Options("fp8")
    yield Options("fp8-block", on_indivisible="channel")


def heads() -> list[Options]:
    """What is compared of output heads: they alone are quantized."""
    return [Options("w8a16", group, targets=("lm_head",)) for group in (32, 64, -1)]


def untied(plain: Path, target: Path) -> Path:
    """The same model in `target`, with a head that has weights of its own."""
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model.config.get_text_config().tie_word_embeddings = False
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(plain).save_pretrained(target)
    return target


@torch.no_grad()
def log_probabilities(folder: Path, tokens: Tensor) -> Iterator[Tensor]:
    """Of the whole vocabulary after every token of each window, float32 [window, vocabulary]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for window in tokens:
        yield torch.log_softmax(model(window[None]).logits[0], -1)


def measure(folder: Path, tokens: Tensor, reference: list[Tensor]) -> tuple[float, float, float]:
    """Perplexity, divergence and agreement of a model; the reference's own where it is empty."""
    loss, divergence, agreement, count = 0.0, 0.0, 0.0, 0
    for index, got in enumerate(log_probabilities(folder, tokens)):
        if len(reference) <= index:
            reference.append(got)
        true = reference[index]
        targets = tokens[index][1:]
        loss -= float(got[:-1].gather(1, targets[:, None]).double().sum())
        divergence += float((true.exp() * (true - got)).sum(-1)[:-1].double().sum())
        agreement += float((got.argmax(-1) == true.argmax(-1))[:-1].double().sum())
        count += len(targets)
    return math.exp(loss / count), divergence / count, agreement / count


def quality(name: str, plain: Path, text: str, windows: int, more: list[Options]) -> Iterator:
    """A Figure for bf16 and for every variant that the model's sizes allow."""
    tokenizer = AutoTokenizer.from_pretrained(plain)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # Gemma is lost without the token that begins every text.
    first = [tokenizer.bos_token_id] if name.startswith("gemma") else []
    own = WINDOW - len(first)
    tokens = torch.tensor([[*first, *ids[i * own : (i + 1) * own]] for i in range(windows)])
    reference: list[Tensor] = []
    size = sum(path.stat().st_size for path in plain.glob("*.safetensors"))
    yield Figure(name, "bf16", "", "", *measure(plain, tokens, reference), size)
    for options in more:
        with tempfile.TemporaryDirectory(dir=layout.BUILD) as folder:
            try:
                report = convert(plain, Path(folder) / "model", options)
            except ConvertError as error:
                print(f"    {options.scheme} {options.weight_group}: {error}", file=sys.stderr)
                continue
            figures = measure(Path(folder) / "model", tokens, reference)
        group = "channel" if options.weight_group < 0 else str(options.weight_group)
        method = options.method + ("" if options.symmetric else ", zero points")
        method += ", weighted" if options.mse_weight != "none" else ""
        yield Figure(name, options.scheme, group, method, *figures, report.bytes_written)


def main() -> None:
    """Prints a Markdown table; --json keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="a text; its last tenth is asked")
    parser.add_argument("--models", default="scratch,smollm2,gemma3", help="of these")
    parser.add_argument("--windows", type=int, default=6, help=f"of {WINDOW} tokens")
    parser.add_argument("--gptq-python", help="an interpreter with llm-compressor: GPTQ too")
    parser.add_argument(
        "--lm-head", action="store_true", help="output heads alone, asked from the text's beginning"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.lm_head and "scratch" in args.models.split(","):
        parser.error("--lm-head leaves no text to train the model scratch on; give other --models")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    text = args.text.read_text(encoding="utf-8", errors="replace")
    cut = 0 if args.lm_head else len(text) * 9 // 10
    figures = []
    print("| model | scheme | group | method | perplexity | KL, nats | same first choice | MB |")
    print("|---|---|---|---|---|---|---|---|")
    with (
        tempfile.NamedTemporaryFile("w", suffix=".txt") as calibration,
        tempfile.TemporaryDirectory(dir=layout.BUILD) as folder,
    ):
        calibration.write(text[:cut])
        calibration.flush()
        more = heads() if args.lm_head else list(variants(calibration.name, args.gptq_python))
        for name in args.models.split(","):
            plain = _plain(name, text[:cut])
            if args.lm_head:
                plain = untied(plain, Path(folder) / name)
            for figure in quality(name, plain, text[cut:], args.windows, more):
                figures.append(figure)
                cells = [figure.model, figure.scheme, figure.group, figure.method]
                cells += [f"{figure.perplexity:.3f}", f"{figure.divergence:.4f}"]
                cells += [f"{figure.agreement:.1%}", f"{figure.bytes / 1e6:.1f}"]
                print(f"| {' | '.join(cells)} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(figure) for figure in figures], indent=1) + "\n")


def _plain(name: str, training: str) -> Path:
    """The bf16 checkpoint of a name, made when it is not there."""
    if name == "scratch":
        return small_model.trained(layout.MODELS / "scratch-bf16", training)
    if name == "gemma3":
        return make_model.gemma3(layout.MODELS / "gemma3-270m-bf16")
    if name == "smollm2":
        return make_model.smollm2(layout.MODELS / make_model.PLAIN)
    raise SystemExit(f"--models has {name!r}; scratch, smollm2 and gemma3 are known")


if __name__ == "__main__":
    main()
