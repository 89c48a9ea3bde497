# SPDX-License-Identifier: Apache-2.0
"""What the kernels support: the only place that says yes or no, and why. Data and arithmetic only;
importable without torch and vLLM, so that the README's table is made from it."""

from dataclasses import dataclass

CHANNEL = -1
"""The group size that means one scale per output channel."""


@dataclass(frozen=True)
class Machine:
    """Where a layer would run: device type, the kernels' instruction set (None: the processor has
    none of ours), whether it has AMX tiles, and whether the user forced an instruction set."""

    device: str
    isa: str | None
    amx: bool = False
    isa_forced: bool = False


@dataclass(frozen=True)
class Request:
    """One linear layer as the loader would hand it over.

    `weight_type` is vLLM's scalar type name ("uint4b8": symmetric, code = q + 8; "uint4":
    asymmetric), `act_dtype` torch's dtype name. `k` and `n` are the input and output size of this
    shard, `full_k` the input size before it was split. `group_size` is along K, CHANNEL for one.
    """

    weight_type: str
    zero_points: bool
    group_size: int
    act_dtype: str
    k: int
    n: int
    full_k: int
    act_order: bool = False


@dataclass(frozen=True)
class Verdict:
    """Yes, or no with a reason that names the value and what is allowed."""

    ok: bool
    reason: str | None = None


@dataclass(frozen=True)
class Row:
    """One line of the matrix: a scheme on a device, and everything it takes."""

    scheme: str
    formats: tuple[str, ...]
    weight_types: tuple[str, ...]
    group_multiple: int
    act_dtypes: tuple[str, ...]
    device: str
    isas: tuple[str, ...]


MATRIX: tuple[Row, ...] = (
    Row(
        scheme="w4a16",
        formats=("compressed-tensors pack-quantized", "AWQ", "GPTQ without activation order"),
        weight_types=("uint4b8", "uint4"),
        group_multiple=8,  # a packed 32-bit word holds 8 codes and must lie in one group
        act_dtypes=("bfloat16", "float16", "float32"),
        device="cpu",
        isas=("avx512bf16", "avx512", "avx2"),
    ),
)

# Code 8 is zero in "uint4b8"; "uint4" carries its zero points beside it.
_NEEDS_ZERO_POINTS = {"uint4b8": False, "uint4": True}


def needs_zero_points(weight_type: str) -> bool:
    """Whether the type's codes are read with zero points beside them (KeyError: unknown type)."""
    return _NEEDS_ZERO_POINTS[weight_type]


def normalize_group_size(group_size: int | str | None, k: int) -> int:
    """The one spelling of a group size: CHANNEL for None, 0, -1, "channel" and for k itself."""
    if group_size in (None, 0, CHANNEL, "channel", k):
        return CHANNEL
    return int(group_size)


def check(
    request: Request, machine: Machine, schemes: tuple[str, ...] = ("w4a16",), scheme: str = "w4a16"
) -> Verdict:
    """Whether `scheme`'s kernel runs this layer on this machine.

    `schemes` are those that the user lets us take (envs.schemes()). The first rule that does not
    hold gives the reason.
    """
    row = next(
        (row for row in MATRIX if (row.scheme, row.device) == (scheme, machine.device)), None
    )
    if row is None:
        known = sorted({row.device for row in MATRIX if row.scheme == scheme})
        return Verdict(False, f"no {scheme} kernel for device {machine.device}, only for {known}")
    if scheme not in schemes:
        return Verdict(False, f"{scheme} is not among the schemes to take {schemes}")
    for problem in (_machine_problem(row, machine), _format_problem(row, request), _shape(request)):
        if problem:
            return Verdict(False, problem)
    return Verdict(True)


def _machine_problem(row: Row, machine: Machine) -> str | None:
    if machine.isa not in row.isas:
        return f"instruction set ({machine.isa}) not supported, supported are {row.isas}"
    if machine.amx and not machine.isa_forced:
        return (
            "this processor has AMX, for which upstream has its own kernel; "
            f"VLLM_PLUGIN_TM_ISA set to one of {row.isas} takes the layer anyway"
        )
    return None


def _format_problem(row: Row, request: Request) -> str | None:
    if request.weight_type not in row.weight_types:
        return (
            f"weight type ({request.weight_type}) not supported, supported are {row.weight_types}"
        )
    if request.zero_points != _NEEDS_ZERO_POINTS[request.weight_type]:
        return (
            f"weight type ({request.weight_type}) with zero points ({request.zero_points}) not "
            f"supported, supported are {_NEEDS_ZERO_POINTS}"
        )
    if request.act_dtype not in row.act_dtypes:
        return (
            f"activation type ({request.act_dtype}) not supported, supported are {row.act_dtypes}"
        )
    if request.act_order:
        return "activation order (g_idx) not supported, only groups of neighbours are"
    group_size = normalize_group_size(request.group_size, request.k)
    if group_size != CHANNEL and (group_size < 1 or group_size % row.group_multiple):
        return (
            f"group size ({request.group_size}) not supported, supported are multiples of "
            f"{row.group_multiple} and {CHANNEL} (channel)"
        )
    return None


def _shape(request: Request) -> str | None:
    if request.k < 1 or request.n < 1:
        return f"layer of input size {request.k} and output size {request.n} is empty"
    group_size = normalize_group_size(request.group_size, request.k)
    if group_size != CHANNEL and request.k % group_size:
        return f"input size ({request.k}) must be a multiple of the group size ({group_size})"
    # The loader splits whole 32-bit words: a shard that ends inside one would get its
    # neighbour's weights.
    if request.k != request.full_k and request.k % 8:
        return (
            f"input size ({request.k}) of a shard of {request.full_k} must be a multiple of 8, "
            "the number of 4-bit codes in a packed word"
        )
    return None


def markdown() -> str:
    """The matrix as a Markdown table, for the README."""
    symmetry = {"uint4b8": "symmetric", "uint4": "asymmetric"}
    lines = [
        "| scheme | formats | weights | group size | activations | device | instruction sets |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in MATRIX:
        cells = (
            row.scheme.upper(),
            ", ".join(row.formats),
            "4-bit " + " and ".join(symmetry[name] for name in row.weight_types),
            f"any multiple of {row.group_multiple} that divides the input size; channel",
            ", ".join(row.act_dtypes),
            row.device.upper(),
            ", ".join(row.isas),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
