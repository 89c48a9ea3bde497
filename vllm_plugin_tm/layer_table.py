# SPDX-License-Identifier: Apache-2.0
"""The table that says, after loading, which layers run on our kernels and which do not, and why."""

from collections import Counter
from dataclasses import astuple, dataclass

import torch
from vllm.model_executor.kernels.linear import (
    FP8ScaledMMLinearKernel,
    Int8ScaledMMLinearKernel,
    MPLinearKernel,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod

from vllm_plugin_tm import machine
from vllm_plugin_tm.quantization.compressed_tensors.compressed_tensors_embedding import (
    TMEmbeddingWNA16,
)
from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_w4a8_int import (
    TMW4A8IntLinearKernel,
)
from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_fp8 import (
    TMFp8LinearKernel,
)
from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_w8a8_int8 import (
    TMInt8ScaledMMLinearKernel,
)
from vllm_plugin_tm.quantization.compressed_tensors.schemes.compressed_tensors_wNa16 import (
    TMWNA16LinearKernel,
)
from vllm_plugin_tm.quantization.experts_method import TMExpertsMethod
from vllm_plugin_tm.quantization.kernel import TMKernel
from vllm_plugin_tm.quantization.load_check import Layer
from vllm_plugin_tm.quantization.online.head import HeadMethod, TableMethod, TiedHeadMethod

TITLE = "vllm-plugin-tm layers"


@dataclass(frozen=True)
class Row:
    """Layers that are alike: `scheme` is upstream's name for the scheme, `kernel` what runs it.

    `isa` and `group_size` (-1: channel) are set for our kernels only. `note` says why layers were
    left to upstream, or what is special about ours. `example` is the first layer's name.
    """

    scheme: str
    kernel: str
    on_tm: bool
    isa: str
    group_size: int | None
    note: str
    count: int
    example: str


_last: tuple[Row, ...] = ()


def tm_kernel_of(module: torch.nn.Module) -> TMKernel | None:
    """The kernel of ours that runs this layer, if one does."""
    kernel = _kernel_of(module)
    return kernel if isinstance(kernel, TMKernel) else None


def is_online(module: torch.nn.Module) -> bool:
    """Whether the layer is quantized as its weights arrive."""
    return bool(getattr(getattr(module, "quant_method", None), "uses_meta_device", False))


def has_tm_layers(model: torch.nn.Module) -> bool:
    """Whether a kernel of ours runs any layer of the model."""
    return any(tm_kernel_of(module) is not None for module in model.modules())


def watched(model: torch.nn.Module) -> list[Layer]:
    """The layers that our kernels take from a checkpoint, as the checks want to know them."""
    fused = getattr(model, "packed_modules_mapping", None) or {}
    layers = []
    for name, module in model.named_modules():
        kernel = tm_kernel_of(module)
        if kernel is None or is_online(module):
            continue
        method = getattr(module, "quant_method", None)
        if isinstance(method, HeadMethod):
            layers.append(method.loaded(name, module))
            continue
        parent, _, leaf = name.rpartition(".")
        parts = [f"{parent}.{part}" if parent else part for part in fused.get(leaf, ())]
        layers += kernel.loaded(name, module, tuple(parts))
    return layers


def collect(model: torch.nn.Module) -> list[Row]:
    """Counts the model's weight-bearing layers by scheme and kernel: ours first, then the rest."""
    counts: Counter[tuple[str, str, bool, str, int | None, str]] = Counter()
    examples: dict[tuple[str, str, bool, str, int | None, str], str] = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if not isinstance(method, QuantizeMethodBase) or isinstance(method, BaseKVCacheMethod):
            continue
        key = _describe(module, method)
        counts[key] += 1
        examples.setdefault(key, name)
    rows = [Row(*key, count=count, example=examples[key]) for key, count in counts.items()]
    return sorted(rows, key=lambda row: (not row.on_tm, -row.count, astuple(row)[:2]))


def render(rows: list[Row]) -> str:
    """The rows as aligned text; the first line starts with TITLE and carries the totals."""
    ours = sum(row.count for row in rows if row.on_tm)
    title = f"{TITLE}: {ours} of {sum(row.count for row in rows)} on TM kernels"
    head = ("layers", "runs on", "kernel", "ISA", "group", "scheme", "note", "first layer")
    cells = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )
    return "\n".join((title, *(f"  {line}" for line in lines)))


def remember(rows: list[Row]) -> None:
    """Keeps the rows for last()."""
    global _last
    _last = tuple(rows)


def last() -> tuple[Row, ...]:
    """The table of the model that this process loaded last; empty before. For RPC into workers."""
    return _last


def _cells(row: Row) -> tuple[str, ...]:
    group = {None: "-", -1: "channel"}.get(row.group_size, str(row.group_size))
    return (
        str(row.count),
        "TM" if row.on_tm else "upstream",
        row.kernel,
        row.isa or "-",
        group,
        row.scheme,
        row.note or "-",
        row.example,
    )


def _kernel_of(module: torch.nn.Module) -> object:
    """What upstream chose for the layer. compressed-tensors keeps it on the layer's scheme, others
    on the quantization method, under several names, AutoRound on the method that its method's
    scheme has made."""
    method = getattr(module, "quant_method", None)
    inner = getattr(getattr(method, "scheme", None), "linear_method", None)
    for owner in (getattr(module, "scheme", None), method, inner):
        for name in ("kernel", "fp8_linear", "linear_kernel"):
            kernel = getattr(owner, name, None)
            if kernel is not None:
                return kernel
    return None


def _describe(
    module: torch.nn.Module, method: QuantizeMethodBase
) -> tuple[str, str, bool, str, int | None, str]:
    """(scheme, kernel, on_tm, isa, group_size, note) of one layer."""
    if isinstance(method, TableMethod) and method.borrowed:
        return (
            "UnquantizedEmbeddingMethod",
            "-",
            False,
            "",
            None,
            "not quantized, the head's copy is",
        )
    if isinstance(method, TiedHeadMethod):
        module, method = method.table, method.table.quant_method
    scheme = type(getattr(module, "scheme", None) or method).__name__
    kernel = _kernel_of(module)
    if isinstance(kernel, TMKernel):
        note = kernel.note or getattr(method, "tm_note", "")
        return (
            scheme,
            type(kernel).__name__,
            True,
            str(machine.detect().isa),
            kernel.group_size,
            note,
        )
    if isinstance(method, TMEmbeddingWNA16):
        note = "rows are unpacked as they are looked up"
        return scheme, TMEmbeddingWNA16.__name__, True, "", None, note
    if isinstance(kernel, MPLinearKernel | Int8ScaledMMLinearKernel | FP8ScaledMMLinearKernel):
        return scheme, type(kernel).__name__, False, "", None, _why_not(kernel)
    if scheme.startswith("Unquantized"):
        return scheme, "-", False, "", None, getattr(method, "tm_note", "not quantized")
    if isinstance(method, TMExpertsMethod):
        return scheme, "-", False, "", None, method.note
    name = type(kernel).__name__ if kernel is not None else "-"
    return scheme, name, False, "", None, "no TM kernel for this scheme"


def _why_not(kernel: MPLinearKernel | Int8ScaledMMLinearKernel | FP8ScaledMMLinearKernel) -> str:
    """Why a layer that upstream's kernel runs is not ours."""
    if isinstance(kernel, FP8ScaledMMLinearKernel):
        ok, reason = TMFp8LinearKernel.can_implement(kernel.config)
    elif isinstance(kernel, Int8ScaledMMLinearKernel):
        ok, reason = TMInt8ScaledMMLinearKernel.can_implement(kernel.config)
    elif str(kernel.config.weight_type) in TMW4A8IntLinearKernel.weight_types:
        ok, reason = TMW4A8IntLinearKernel.can_implement(kernel.config)
    else:
        ok, reason = TMWNA16LinearKernel.can_implement(kernel.config)
    return "TM kernel could run it, but upstream passed it over" if ok else str(reason)
