# SPDX-License-Identifier: Apache-2.0
"""The command's options: text to values; every message names the value and the accepted form."""

import argparse
import difflib
from pathlib import Path

from vllm_plugin_tm.bench import cases, plot
from vllm_plugin_tm.bench.moe_cases import LAYERS, Layer
from vllm_plugin_tm.bench.schemes import FAMILIES, SCHEMES
from vllm_plugin_tm.quantization.support_matrix import CHANNEL

ALL = "all"


def shapes(text: str) -> tuple[tuple[int, int], ...]:
    """ "4096x4096,576x576" -> ((4096, 4096), (576, 576)), each N x K."""
    return tuple(_shape(part) for part in text.split(","))


def layers(text: str) -> tuple[Layer, ...]:
    """ "mixtral,8x64x32x2" -> that model's layer and one of 8 experts, hidden 64, intermediate 32,
    top 2."""
    return tuple(_layer(part.strip().lower()) for part in text.split(","))


def batches(text: str) -> tuple[int, ...]:
    """ "1,16" -> (1, 16)."""
    return tuple(_positive(part, "a batch size M, for example 16") for part in text.split(","))


def group_sizes(text: str) -> tuple[int, ...]:
    """ "32,channel" -> (32, CHANNEL)."""
    return tuple(_group_size(part) for part in text.split(","))


def schemes(text: str) -> tuple[str, ...]:
    """ "w4a16,W8A8" -> ("w4a16", "w8a8"); "fp8" -> that family; "all" -> every one."""
    if text.strip() == ALL:
        return tuple(SCHEMES)
    allowed = (*SCHEMES, *FAMILIES, ALL)
    chosen = tuple(_one_of(part.lower(), allowed, "scheme") for part in text.split(","))
    if ALL in chosen:
        raise argparse.ArgumentTypeError(f"{text!r}: {ALL} stands alone")
    every = [name for part in chosen for name in FAMILIES.get(part, (part,))]
    return tuple(dict.fromkeys(every))


def dtypes(text: str) -> tuple[str, ...]:
    """ "bf16,f32" -> ("bf16", "f32")."""
    return tuple(_one_of(part, cases.DTYPES, "dtype") for part in text.split(","))


def kernels(text: str) -> tuple[str, ...]:
    """ "tm,torch" -> ("tm", "torch")."""
    return tuple(_one_of(part, cases.KERNELS, "kernel") for part in text.split(","))


def threads(text: str) -> int:
    """A number of threads, at least 1."""
    return _positive(text, "a number of threads, for example 2")


def output_file(text: str) -> Path:
    """A file in a directory that exists: better refused before the run than after it."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: the directory {path.parent} does not exist")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a directory, expected a file name")
    return path


def plot_file(text: str) -> Path:
    """An output file whose name says which kind of picture."""
    path = output_file(text)
    if path.suffix not in plot.SUFFIXES:
        allowed = ", ".join(plot.SUFFIXES)
        raise argparse.ArgumentTypeError(f"{text}: expected a name ending in one of {allowed}")
    return path


def isas(text: str, available: tuple[str, ...]) -> tuple[str, ...]:
    """ "avx512,avx2" or "all" -> names among `available`, best first as given there.

    Raises:
        ValueError: a name that is not among them.
    """
    if text == ALL:
        return available
    chosen = text.split(",")
    for name in chosen:
        if name not in available:
            raise ValueError(
                f"--isa: {name!r} is not one of {', '.join(available)} (what can run here) or all"
            )
    return tuple(name for name in available if name in chosen)


def _shape(text: str) -> tuple[int, int]:
    n, x, k = text.strip().lower().partition("x")
    if not (x and n.isdecimal() and k.isdecimal() and int(n) and int(k)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form NxK, output by input size, for example 4096x4096"
        )
    if int(n) % 8 or int(k) % 8:
        raise argparse.ArgumentTypeError(f"{text!r}: N and K must be multiples of 8")
    return int(n), int(k)


def _layer(text: str) -> Layer:
    if "x" not in text or not text[0].isdecimal():
        return LAYERS[_one_of(text, tuple(LAYERS), "layer")]
    sizes = [int(part) if part.isdecimal() else 0 for part in text.split("x")]
    if len(sizes) != 4 or not all(sizes):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form EXPERTSxHIDDENxINTERMEDIATExTOP_K, for example "
            "128x2048x768x8"
        )
    experts, hidden, intermediate, top_k = sizes
    if hidden % 8 or intermediate % 8:
        raise argparse.ArgumentTypeError(
            f"{text!r}: the hidden and the intermediate size must be multiples of 8"
        )
    if top_k > experts:
        raise argparse.ArgumentTypeError(f"{text!r}: top {top_k} of {experts} experts")
    return Layer(text, experts, hidden, intermediate, top_k)


def _group_size(text: str) -> int:
    if text.strip() == "channel":
        return CHANNEL
    size = _positive(text, "a group size: a multiple of 8, for example 128, or channel")
    if size % 8:
        raise argparse.ArgumentTypeError(f"{text!r}: a group size must be a multiple of 8")
    return size


def _positive(text: str, expected: str) -> int:
    if not text.strip().isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return int(text)


def _one_of(text: str, allowed: tuple[str, ...], what: str) -> str:
    name = text.strip()
    if name in allowed:
        return name
    close = difflib.get_close_matches(name, allowed, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise argparse.ArgumentTypeError(
        f"{name!r} is not a known {what}; known are {', '.join(allowed)}{hint}"
    )
