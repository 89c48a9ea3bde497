# SPDX-License-Identifier: Apache-2.0
"""What the kernels support: the only place that says yes or no, and why. Data and arithmetic only;
importable without torch and vLLM, so that the README's table is made from it."""

import math
from dataclasses import dataclass, replace

from vllm_plugin_tm.envs import ISAS, SCHEMES

CHANNEL = -1
"""The group size that means one scale per output channel."""

WORD_BITS = 32
"""Bits of the words that packed checkpoints are made of."""


CUDA_ISAS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_90 as PTX")
"""What a GPU's kernels are compiled for: a GPU runs those of its compute capability, of an older
one of the same generation, or, if it is newer than all of them, what its driver makes of PTX."""


@dataclass(frozen=True)
class Machine:
    """Where a layer would run: device type, and the kernels' instruction set (None: the device has
    none of ours)."""

    device: str
    isa: str | None


@dataclass(frozen=True)
class WeightType:
    """How a checkpoint holds weights: `bits` of a code, whether zero points stand beside them, and
    whether codes share 32-bit words (else bytes). `floats` names those that are no integers."""

    bits: int
    zero_points: bool
    packed: bool
    floats: str = ""


def _weight_types() -> dict[str, WeightType]:
    types = {f"int{bits}": WeightType(bits, False, False) for bits in (4, 8)}
    for bits in range(2, 9):
        # Code 2**(bits - 1) is zero in the biased type; the other has zero points beside it.
        types[f"uint{bits}b{1 << (bits - 1)}"] = WeightType(bits, False, True)
        types[f"uint{bits}"] = WeightType(bits, True, True)
    types["float8_e4m3fn"] = WeightType(8, False, False, "e4m3")
    types["mxfp4"] = WeightType(4, False, False, "e2m1 under e8m0 scales")
    types["nvfp4"] = WeightType(4, False, False, "e2m1 under e4m3 scales and a float32 one")
    return types


WEIGHT_TYPES = _weight_types()
"""vLLM's names for types of weights, and what they say of a checkpoint."""


@dataclass(frozen=True)
class Request:
    """One linear layer as the loader would hand it over.

    `weight_type` is a name of WEIGHT_TYPES, `act_dtype` torch's dtype name. `k` and `n` are the
    input and output size of this shard, `full_k` and `full_n` those before it was split (`full_n`
    None: not split). `group_size` is along K, CHANNEL for one.
    """

    weight_type: str
    zero_points: bool
    group_size: int
    act_dtype: str
    k: int
    n: int
    full_k: int
    full_n: int | None = None
    act_order: bool = False


@dataclass(frozen=True)
class MoeRequest:
    """The routed experts of one layer as the loader would hand them over.

    `scheme` is a member of envs.SCHEMES; `activation` a name of MOE_ACTIVATIONS;
    `hidden` and `intermediate` the sizes of an expert in this shard, `full_intermediate` that
    before it was split. The other fields are those of Request.
    """

    scheme: str
    weight_type: str
    zero_points: bool
    group_size: int
    act_dtype: str
    hidden: int
    intermediate: int
    full_intermediate: int
    activation: str

    def products(self) -> dict[str, Request]:
        """The two products by the names of their weights; gates and ups are cut like shards."""
        common = (self.weight_type, self.zero_points, self.group_size, self.act_dtype)
        inner, outer = self.intermediate, self.hidden
        return {
            "w13": Request(*common, k=outer, n=inner, full_k=outer, full_n=2 * inner),
            "w2": Request(*common, k=inner, n=outer, full_k=self.full_intermediate),
        }


@dataclass(frozen=True)
class Verdict:
    """Yes, or no with a reason that names the value and what is allowed."""

    ok: bool
    reason: str | None = None


@dataclass(frozen=True)
class Row:
    """One line of the matrix: a scheme on a device, and everything it takes.

    `group_multiple` is what group sizes are multiples of; None: no groups, one scale per channel.
    `more_groups` are sizes beside these, `longest_group` is the longest one if there is any.
    `groups` says it in words where that is not all.
    `rounding` says what happens to activations, empty where they are kept.
    """

    scheme: str
    formats: tuple[str, ...]
    weight_types: tuple[str, ...]
    group_multiple: int | None
    act_dtypes: tuple[str, ...]
    rounding: str
    device: str
    isas: tuple[str, ...]
    groups: str = ""
    more_groups: tuple[int, ...] = ()
    longest_group: int | None = None

    def group_sizes(self) -> str:
        """The sizes of groups in words."""
        if self.group_multiple is None:
            return f"{CHANNEL} (channel)"
        sizes = [str(size) for size in self.more_groups] + [f"multiples of {self.group_multiple}"]
        if self.longest_group is not None:
            sizes[-1] += f" up to {self.longest_group}"
        return f"{', '.join(sizes)} and {CHANNEL} (channel)"

    def takes_group(self, size: int) -> bool:
        """Whether a group may have this size; CHANNEL always may."""
        if size == CHANNEL or size in self.more_groups:
            return True
        fits = self.group_multiple is not None and size >= 1 and size % self.group_multiple == 0
        return fits and (self.longest_group is None or size <= self.longest_group)


def _packed(*bits: int) -> tuple[str, ...]:
    """The packed weight types of these widths, in the order of the widths."""
    return tuple(
        name for b in bits for name, kind in WEIGHT_TYPES.items() if kind.packed and kind.bits == b
    )


_FLOATS = ("bfloat16", "float16", "float32")
_PACKED = "compressed-tensors pack-quantized"
_PACKED_A8 = "compressed-tensors pack-quantized with int8 activations"
_HALVES = ("bfloat16", "float16")


def _cuda(rows: tuple[Row, ...], experts: bool) -> tuple[Row, ...]:
    """The schemes that have CUDA kernels, as the CPU has them except for what is said here: a group
    is half a slab of 64 weights, or whole ones, and sums of codes in it stay below 2**22."""
    w4a16, w4a8, w8a8 = (
        replace(
            next(row for row in rows if row.scheme == scheme),
            device="cuda",
            isas=CUDA_ISAS,
            act_dtypes=_HALVES,
        )
        for scheme in ("w4a16", "w4a8", "w8a8")
    )
    w4a16 = replace(w4a16, group_multiple=64, more_groups=(32,))
    w4a8 = replace(w4a8, group_multiple=64, more_groups=(32,), longest_group=2048)
    w4a8 = replace(w4a8, rounding="int8, symmetric, per token")
    if experts:
        w4a8 = replace(w4a8, formats=w4a8.formats[:2], weight_types=("int4", "uint4b8"))
    return w4a16, w4a8, w8a8


_CPU_MATRIX: tuple[Row, ...] = (
    Row(
        scheme="w4a16",
        formats=(_PACKED, "4 bits also: AWQ, GPTQ without activation order, Quark"),
        weight_types=_packed(4, 3, 2),
        group_multiple=8,  # a word of the kernel layout holds 8 weights and lies in one group
        act_dtypes=_FLOATS,
        rounding="",
        device="cpu",
        isas=ISAS,
    ),
    Row(
        scheme="w8a16",
        formats=(_PACKED, "8 bits also: GPTQ without activation order"),
        weight_types=_packed(8, 7, 6, 5),
        group_multiple=4,  # as above, of 4 weights
        act_dtypes=_FLOATS,
        rounding="",
        device="cpu",
        isas=ISAS,
    ),
    Row(
        scheme="w4a8",
        formats=("compressed-tensors int-quantized", _PACKED_A8),
        weight_types=("int4", *_packed(4, 3, 2)),
        group_multiple=8,
        act_dtypes=_FLOATS,
        rounding="int8, symmetric, per token or per token and group",
        device="cpu",
        isas=ISAS,
    ),
    Row(
        scheme="w8a8",
        formats=("compressed-tensors int-quantized", "Quark", f"8 bits symmetric: {_PACKED_A8}"),
        weight_types=("int8", "uint8b128"),
        group_multiple=None,
        act_dtypes=_FLOATS,
        rounding="int8, with or without zero point, per token or static per tensor",
        device="cpu",
        isas=ISAS,
    ),
    Row(
        scheme="fp8",
        formats=(
            "compressed-tensors float-quantized",
            "FP8 as DeepSeek and Qwen have it (`weight_scale_inv`)",
            "ModelOpt per channel, and per tensor; FBGEMM and Quark per channel",
        ),
        weight_types=("float8_e4m3fn",),
        group_multiple=4,  # a word of the kernel layout holds 4 weights and lies in one group
        groups="tensor, channel, blocks (128 x 128 and others)",
        act_dtypes=_FLOATS,
        rounding="e4m3, per token, per token and 128 neighbours, or static per tensor; W8A16 kept",
        device="cpu",
        isas=ISAS,
    ),
    Row(
        scheme="fp4",
        formats=("compressed-tensors MXFP4 and NVFP4", "ModelOpt NVFP4"),
        weight_types=("mxfp4", "nvfp4"),
        group_multiple=8,
        groups="32 (MXFP4), 16 (NVFP4)",
        act_dtypes=_FLOATS,
        rounding="",
        device="cpu",
        isas=ISAS,
    ),
)

_CPU_MOE_MATRIX: tuple[Row, ...] = (
    Row(
        scheme="w4a16",
        formats=(_PACKED, "4 bits also: AWQ, GPTQ without activation order"),
        weight_types=_packed(4, 3, 2),
        group_multiple=8,
        act_dtypes=_FLOATS,
        rounding="",
        device="cpu",
        isas=ISAS,
    ),
    Row(
        scheme="w8a16",
        formats=(_PACKED, "8 bits also: GPTQ without activation order"),
        weight_types=_packed(8, 7, 6, 5),
        group_multiple=4,
        act_dtypes=_FLOATS,
        rounding="",
        device="cpu",
        isas=ISAS,
    ),
    Row(
        scheme="w4a8",
        formats=(
            "compressed-tensors int-quantized: 4 bits, symmetric",
            f"{_PACKED_A8}: the same",
            "those of W4A16 where VLLM_PLUGIN_TM_W4A16_INT8_ACTIVATIONS=1",
        ),
        weight_types=("int4", *_packed(4, 3, 2)),
        group_multiple=8,
        act_dtypes=_FLOATS,
        rounding="int8, symmetric, per token or, for the last, per token and group",
        device="cpu",
        isas=ISAS,
    ),
    Row(
        scheme="w8a8",
        formats=("compressed-tensors int-quantized",),
        weight_types=("int8",),
        group_multiple=None,
        act_dtypes=_FLOATS,
        rounding="int8, symmetric, per token",
        device="cpu",
        isas=ISAS,
    ),
    Row(
        scheme="fp8",
        formats=(
            "compressed-tensors float-quantized",
            "FP8 as DeepSeek and Qwen have it",
            "ModelOpt per tensor",
        ),
        weight_types=("float8_e4m3fn",),
        group_multiple=4,
        groups="tensor, channel, blocks (128 x 128 and others)",
        act_dtypes=_FLOATS,
        rounding="e4m3, per token, per token and 128 neighbours, or static per tensor",
        device="cpu",
        isas=ISAS,
    ),
    Row(
        scheme="fp4",
        formats=(
            "compressed-tensors MXFP4 and NVFP4",
            "MXFP4 as gpt-oss has it",
            "ModelOpt NVFP4",
        ),
        weight_types=("mxfp4", "nvfp4"),
        group_multiple=8,
        groups="32 (MXFP4), 16 (NVFP4)",
        act_dtypes=_FLOATS,
        rounding="",
        device="cpu",
        isas=ISAS,
    ),
)

MATRIX: tuple[Row, ...] = (*_CPU_MATRIX, *_cuda(_CPU_MATRIX, experts=False))
"""Linear layers."""

MOE_MATRIX: tuple[Row, ...] = (*_CPU_MOE_MATRIX, *_cuda(_CPU_MOE_MATRIX, experts=True))
"""Routed experts; both products of an expert are of one kind."""

MOE_ACTIVATIONS = (
    *("silu", "swigluoai", "swigluoai_uninterleave", "swiglustep", "situ", "gelu", "gelu_tanh"),
    *("silu_no_mul", "gelu_no_mul", "gelu_tanh_no_mul", "relu2_no_mul"),
)
"""What may stand between the products of an expert, by vLLM's names."""

# What a layer counts as when only its weights are known: upstream's configuration of a packed layer
# does not say whether activations are to be quantized.
_SCHEME_OF = {"int4": "w4a8", "int8": "w8a8"} | {
    name: row.scheme
    for row in _CPU_MATRIX
    if row.scheme.endswith("a16") or row.scheme.startswith("fp")
    for name in row.weight_types
}


def scheme_of(weight_type: str) -> str | None:
    """The scheme that a layer with these weights is taken as; None for weights of no scheme."""
    return _SCHEME_OF.get(weight_type)


def needs_zero_points(weight_type: str) -> bool:
    """Whether the type's codes are read with zero points beside them (KeyError: unknown type)."""
    return WEIGHT_TYPES[weight_type].zero_points


def normalize_group_size(group_size: int | str | None, k: int) -> int:
    """The one spelling of a group size: CHANNEL for None, 0, -1, "channel" and for k itself."""
    if group_size in (None, 0, CHANNEL, "channel", k):
        return CHANNEL
    return int(group_size)


def whole_words(bits: int) -> int:
    """Of what number of `bits`-bit codes a multiple fills whole 32-bit words."""
    return WORD_BITS // math.gcd(WORD_BITS, bits)


def check(
    request: Request,
    machine: Machine,
    schemes: tuple[str, ...] = SCHEMES,
    scheme: str | None = None,
) -> Verdict:
    """Whether `scheme`'s kernel runs this layer on this machine; None: the one of scheme_of().

    `schemes` are those that the user lets us take (envs.schemes()). The first rule that does not
    hold gives the reason.
    """
    scheme = scheme or scheme_of(request.weight_type)
    if scheme is None:
        return Verdict(
            False,
            f"weight type ({request.weight_type}) not supported, supported are {tuple(_SCHEME_OF)}",
        )
    verdict = check_machine(scheme, machine, schemes, act_dtype=request.act_dtype)
    if not verdict.ok:
        return verdict
    row = _row(scheme, machine.device)
    assert row is not None
    problem = _format_problem(row, request) or _shape(request)
    return Verdict(problem is None, problem)


def check_moe(request: MoeRequest, machine: Machine, schemes: tuple[str, ...] = SCHEMES) -> Verdict:
    """As `check`, for routed experts."""
    verdict = check_machine(request.scheme, machine, schemes, MOE_MATRIX)
    if not verdict.ok:
        return verdict
    row = _row(request.scheme, machine.device, MOE_MATRIX)
    assert row is not None
    for name, product in request.products().items():
        problem = _format_problem(row, product) or _shape(product)
        if problem:
            return Verdict(False, f"{name}: {problem}")
    if request.activation not in MOE_ACTIVATIONS:
        reason = f"activation ({request.activation}) not supported, supported are {MOE_ACTIVATIONS}"
        return Verdict(False, reason)
    return Verdict(True)


def check_machine(
    scheme: str,
    machine: Machine,
    schemes: tuple[str, ...] = SCHEMES,
    matrix: tuple[Row, ...] = MATRIX,
    act_dtype: str | None = None,
) -> Verdict:
    """The rules of `check` that do not look at the layer beyond its activations' dtype (None: not
    known)."""
    row = _row(scheme, machine.device, matrix)
    if row is None:
        known = sorted({row.device for row in matrix if row.scheme == scheme})
        return Verdict(False, f"no {scheme} kernel for device {machine.device}, only for {known}")
    if scheme not in schemes:
        return Verdict(False, f"{scheme} is not among the schemes to take {schemes}")
    if machine.isa not in row.isas:
        reason = f"instruction set ({machine.isa}) not supported, supported are {row.isas}"
        return Verdict(False, reason)
    if act_dtype is not None and act_dtype not in row.act_dtypes:
        return Verdict(False, _act_dtype_problem(row, act_dtype))
    return Verdict(True)


def split_problem(bits: int, part: int, what: str) -> str | None:
    """Why packed `bits`-bit codes cannot be cut after `part` of them: the loader moves whole words,
    so a part that ends inside one would get its neighbour's codes. None where it can be."""
    whole = whole_words(bits)
    if part % whole == 0:
        return None
    return (
        f"{what} ({part}) must be a multiple of {whole}: the loader splits packed {bits}-bit codes "
        f"at whole {WORD_BITS}-bit words"
    )


def _row(scheme: str, device: str, matrix: tuple[Row, ...] = MATRIX) -> Row | None:
    return next((row for row in matrix if (row.scheme, row.device) == (scheme, device)), None)


def _act_dtype_problem(row: Row, act_dtype: str) -> str:
    return f"activation type ({act_dtype}) not supported, supported are {row.act_dtypes}"


def _format_problem(row: Row, request: Request) -> str | None:
    if request.weight_type not in row.weight_types:
        return (
            f"weight type ({request.weight_type}) not supported, supported are {row.weight_types}"
        )
    if request.zero_points != needs_zero_points(request.weight_type):
        return (
            f"weight type ({request.weight_type}) with zero points ({request.zero_points}) not "
            f"supported, it goes with zero points ({not request.zero_points})"
        )
    if request.act_dtype not in row.act_dtypes:
        return _act_dtype_problem(row, request.act_dtype)
    if request.act_order:
        return "activation order (g_idx) not supported, only groups of neighbours are"
    group_size = normalize_group_size(request.group_size, request.k)
    if group_size == CHANNEL:
        return None
    if not row.takes_group(group_size):
        are = "is" if row.group_multiple is None else "are"
        sizes = row.group_sizes()
        return f"group size ({request.group_size}) not supported, supported {are} {sizes}"
    return None


def _shape(request: Request) -> str | None:
    if request.k < 1 or request.n < 1:
        return f"layer of input size {request.k} and output size {request.n} is empty"
    group_size = normalize_group_size(request.group_size, request.k)
    if group_size != CHANNEL and request.k % group_size:
        return f"input size ({request.k}) must be a multiple of the group size ({group_size})"
    kind = WEIGHT_TYPES[request.weight_type]
    if kind.packed and request.k != request.full_k:
        problem = split_problem(
            kind.bits, request.k, f"the input size of a shard of {request.full_k}"
        )
        if problem:
            return problem
    if kind.zero_points and request.full_n not in (None, request.n):
        return split_problem(
            kind.bits, request.n, f"the output size of a shard of {request.full_n}"
        )
    return None


def markdown(matrix: tuple[Row, ...] = MATRIX) -> str:
    """A matrix as a Markdown table, for the README."""
    lines = [
        "| scheme | formats | weights | group size | activations | device | instruction sets |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in matrix:
        cells = (
            row.scheme.upper(),
            "; ".join(row.formats),
            _weights(row),
            _groups(row),
            ", ".join(row.act_dtypes) + (f"; rounded to {row.rounding}" if row.rounding else ""),
            row.device.upper(),
            ", ".join(row.isas),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _groups(row: Row) -> str:
    if row.groups:
        return row.groups
    if row.group_multiple is None:
        return "channel; one scale for a tensor"
    more = "".join(f"{size}, " for size in row.more_groups)
    most = f" up to {row.longest_group}" if row.longest_group else ""
    return f"{more}any multiple of {row.group_multiple}{most} that divides the input size; channel"


def _weights(row: Row) -> str:
    """As "2, 3 and 4 bits, symmetric and asymmetric"."""
    kinds = [WEIGHT_TYPES[name] for name in row.weight_types]
    if kinds[0].floats:
        return "; ".join(kind.floats for kind in kinds)
    widths = sorted({kind.bits for kind in kinds})
    text = ", ".join(str(bits) for bits in widths[:-1])
    text = f"{text} and {widths[-1]} bits" if text else f"{widths[-1]} bits"
    symmetry = " and asymmetric" if any(kind.zero_points for kind in kinds) else ""
    return f"{text}, symmetric{symmetry}"
