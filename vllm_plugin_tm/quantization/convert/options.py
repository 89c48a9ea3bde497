# SPDX-License-Identifier: Apache-2.0
"""What a conversion is asked to do: schemes, methods and the other options, validated.

Importable without torch: the command's help is made from it.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from vllm_plugin_tm.quantization.convert.errors import ConvertError
from vllm_plugin_tm.quantization.support_matrix import CHANNEL

BLOCK = 128
"""Rows and columns of a block of `fp8-block` by default, and at most."""

BLOCK_SIZES = (32, 64, BLOCK)
"""All that they may be: they divide each other, so pieces of rows may be cut at BLOCK."""

PACK_QUANTIZED = "pack-quantized"
INT_QUANTIZED = "int-quantized"
FLOAT_QUANTIZED = "float-quantized"


@dataclass(frozen=True)
class Scheme:
    """How weights and activations are held: `bits` of a weight, `kind` "int" or "float",
    `formats` of compressed-tensors that hold it (the first is the default), `activations` what
    they are rounded to when used ("" for none), `grouped` whether groups along K are possible,
    `asymmetric` whether zero points are, `methods` of rounding."""

    bits: int
    kind: str
    formats: tuple[str, ...]
    activations: str
    grouped: bool
    asymmetric: bool
    methods: tuple[str, ...]


METHODS = {
    "rtn": "round to nearest, ranges from minimum and maximum",
    "signed": "round to nearest, the extreme of each group is the lowest code (symmetric only)",
    "mse": "ranges searched for the least squared error",
    "gptq": "calibrated by llm-compressor on a text of yours",
}
"""Method -> what it does."""

_INT_METHODS = ("rtn", "signed", "mse", "gptq")

SCHEMES = {
    "w4a16": Scheme(4, "int", (PACK_QUANTIZED,), "", True, True, _INT_METHODS),
    "w8a16": Scheme(8, "int", (PACK_QUANTIZED,), "", True, True, _INT_METHODS),
    "w4a8": Scheme(4, "int", (INT_QUANTIZED, PACK_QUANTIZED), "int8", True, False, _INT_METHODS),
    "w8a8": Scheme(8, "int", (INT_QUANTIZED,), "int8", False, False, _INT_METHODS),
    "fp8": Scheme(8, "float", (FLOAT_QUANTIZED,), "fp8", False, False, ("rtn",)),
    "fp8-block": Scheme(8, "float", (FLOAT_QUANTIZED,), "fp8-block", False, False, ("rtn",)),
}
"""Scheme -> what it is; the names are `--scheme`'s."""

ON_INDIVISIBLE = ("error", "channel", "skip")
"""What to do where the group size does not divide K, or the block size N or K: stop, one scale per
output channel for that layer, or leave that layer as it is."""

MSE_WEIGHTS = ("none", "square")
"""What `mse` weighs a weight's squared error with: nothing, or the weight's own square."""

SCALES = ("float", "ue8m0")
"""What scales of FP8 weights may be: any number, or powers of two, rounded up."""

_POSITIVE = (
    *("workers", "max_memory", "shard_bytes"),
    *("calibration_samples", "calibration_length"),
)
DEFAULT_GROUP_SIZE = 32
GiB = 1 << 30
DEFAULT_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Options:
    """A request for a conversion; see the fields of SCHEMES, METHODS and the constants above.

    `group_size` None is the scheme's default (32 where groups are possible, else CHANNEL), and
    `block_size` None is BLOCK where there are blocks.
    `targets` and `ignore` are names of modules, or regular expressions after "re:", as in
    compressed-tensors; targets None is the attention, MLP and expert projections of decoder
    layers. `lm_head` and `mtp` add those to the default targets. `max_memory` bounds the process's
    resident bytes, None: a quarter of the machine's. `workers` None: one for each processor of
    this process. `calibration` is the text file that "gptq" reads, in so many
    samples of so many tokens; `calibration_python` the interpreter that has llm-compressor (None:
    this one).
    """

    scheme: str
    group_size: int | None = None
    block_size: int | None = None
    symmetric: bool = True
    method: str = "rtn"
    format: str | None = None
    ignore: tuple[str, ...] = ()
    targets: tuple[str, ...] | None = None
    lm_head: bool = False
    mtp: bool = False
    on_indivisible: str = "error"
    mse_weight: str = "none"
    scales: str = "float"
    workers: int | None = None
    max_memory: int | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES
    resume: bool = False
    calibration: str | None = None
    calibration_samples: int = 128
    calibration_length: int = 512
    calibration_python: str | None = None
    _details: Scheme = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises ConvertError naming option, value and what is allowed."""
        _one_of("scheme", self.scheme, SCHEMES)
        scheme = SCHEMES[self.scheme]
        object.__setattr__(self, "_details", scheme)
        _one_of("method", self.method, METHODS)
        if self.method not in scheme.methods:
            raise ConvertError(
                f"method {self.method!r} does not go with scheme {self.scheme}; "
                f"allowed are {', '.join(scheme.methods)}"
            )
        if self.format is not None and self.format not in scheme.formats:
            raise ConvertError(
                f"format {self.format!r} does not go with scheme {self.scheme}; "
                f"allowed are {', '.join(scheme.formats)}"
            )
        self._check_groups()
        self._check_blocks()
        if not self.symmetric and not scheme.asymmetric:
            raise ConvertError(
                f"scheme {self.scheme} has no zero points (--no-symmetric); "
                f"{_schemes(lambda other: other.asymmetric)} have"
            )
        if not self.symmetric and self.method == "signed":
            raise ConvertError("method 'signed' is for symmetric weights; drop --no-symmetric")
        _one_of("on_indivisible", self.on_indivisible, ON_INDIVISIBLE)
        _one_of("mse_weight", self.mse_weight, MSE_WEIGHTS)
        if self.mse_weight != "none" and self.method != "mse":
            raise ConvertError(
                f"mse_weight {self.mse_weight!r} is for method 'mse', which is {self.method!r}"
            )
        _one_of("scales", self.scales, SCALES)
        if self.scales != "float" and scheme.kind != "float":
            raise ConvertError(
                f"scales {self.scales!r} do not go with scheme {self.scheme}; "
                f"{_schemes(lambda other: other.kind == 'float')} may have them"
            )
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConvertError(f"{name} is {value}; a number above zero is allowed")
        if (self.calibration is None) == (self.method == "gptq"):
            raise ConvertError(
                "method 'gptq' needs a text to calibrate with (--calibration FILE)"
                if self.method == "gptq"
                else f"a calibration text is for method 'gptq', not {self.method!r}"
            )
        for pattern in (*self.ignore, *(self.targets or ())):
            _check_pattern(pattern)

    def _check_groups(self) -> None:
        size = self.group_size
        if size is None or (size == CHANNEL and not self.blocks):
            return
        if not self.details.grouped:
            text = "channel" if size == CHANNEL else size
            raise ConvertError(
                f"group size {text} does not go with scheme {self.scheme}, "
                "whose scales are per output channel or per block; leave it out"
            )
        if size < 1 or size % 8:
            raise ConvertError(
                f"group size {size} is not allowed; multiples of 8 and channel are, "
                "of which 32, 64 and 128 run everywhere"
            )

    def _check_blocks(self) -> None:
        size = self.block_size
        if size is None:
            return
        if not self.blocks:
            raise ConvertError(
                f"block size {size} does not go with scheme {self.scheme}; "
                f"{_schemes(lambda other: other.activations == 'fp8-block')} has blocks"
            )
        if size not in BLOCK_SIZES:
            allowed = ", ".join(map(str, BLOCK_SIZES))
            raise ConvertError(f"block size {size} is not allowed; allowed are {allowed}")

    @property
    def details(self) -> Scheme:
        """What the scheme's name stands for."""
        return self._details

    @property
    def weight_format(self) -> str:
        """The compressed-tensors format of the quantized weights."""
        return self.format or self.details.formats[0]

    @property
    def weight_group(self) -> int:
        """The group size along K, CHANNEL for one scale per output channel; rows and columns of a
        block where there are blocks."""
        if self.blocks:
            return self.block_size or BLOCK
        if self.group_size is not None:
            return self.group_size
        return DEFAULT_GROUP_SIZE if self.details.grouped else CHANNEL

    @property
    def blocks(self) -> bool:
        """Whether square blocks of weights share a scale."""
        return self.details.activations == "fp8-block"

    def in_blocks(self, group_size: int | None) -> bool:
        """Whether a matrix of this group size has blocks: those they do not fit have channels."""
        return self.blocks and group_size not in (None, CHANNEL)


def parse_group_size(text: str) -> int:
    """ "32" or "channel" as a group size. Raises ConvertError for anything else."""
    if text == "channel":
        return CHANNEL
    if not text.isdigit() or not int(text):
        raise ConvertError(f"group size {text!r} is not a number above zero or channel")
    return int(text)


def parse_bytes(text: str) -> int:
    """ "800M", "2.5G", "4GiB" or plain bytes. Raises ConvertError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise ConvertError(f"{text!r} is no amount of memory; 800M and 4GiB are")
    unit, binary = match[2].upper(), (match[3] or "").lower() == "ib"
    power = " KMGT".index(unit) if unit else 0
    return int(float(match[1]) * (1024 if binary else 1000) ** power)


def _schemes(fits: Callable[[Scheme], bool]) -> str:
    return ", ".join(name for name, scheme in SCHEMES.items() if fits(scheme))


def _one_of(name: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ConvertError(f"{name} {value!r} is not known; allowed are {', '.join(allowed)}")


def _check_pattern(pattern: str) -> None:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ConvertError(f"pattern {pattern!r} is no regular expression: {error}") from None
    elif any(sign in pattern for sign in "*?[\\"):
        raise ConvertError(
            f"pattern {pattern!r} is taken as the whole name of a module; a regular expression "
            "starts with re:, as in re:.*\\.o_proj$"
        )
