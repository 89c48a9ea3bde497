# SPDX-License-Identifier: Apache-2.0
"""The compiled ops: loading the extension, their fakes, and the instruction set they run on."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NAMESPACE = "vllm_plugin_tm"
EXTENSION = "_C.abi3.so"

# Geometry of the kernel layout, as csrc/cpu/layout_u4g.h has it.
TILE_N = 16
DWORD_K = 8


class ExtensionMissingError(RuntimeError):
    """The compiled extension is not there or cannot be loaded; says why, and the cure."""


def extension_path() -> Path | None:
    """Where the extension lies, or None. An editable install keeps it apart from the sources."""
    import vllm_plugin_tm

    for directory in vllm_plugin_tm.__path__:
        path = Path(directory) / EXTENSION
        if path.is_file():
            return path
    return None


@functools.cache
def load() -> None:
    """Loads the extension into torch and registers the fakes; idempotent.

    Raises ExtensionMissingError with the reason.
    """
    import torch

    path = extension_path()
    if path is None:
        raise ExtensionMissingError(
            f"vllm-plugin-tm: the compiled extension {EXTENSION} is missing from the installed "
            "package; build it with `pip install .` in the source tree (needs g++ 11 or newer)"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ExtensionMissingError(
            f"vllm-plugin-tm: {path} cannot be loaded with torch {torch.__version__}: {error}; "
            "it needs torch 2.11 or newer"
        ) from error
    _register_fakes()


def is_available() -> bool:
    """True where the extension can be loaded."""
    try:
        load()
    except (ExtensionMissingError, ImportError):
        return False
    return True


def cpu_isas() -> tuple[str, ...]:
    """Instruction sets this processor can run, best first; empty where there is no kernel."""
    import torch

    load()
    names = torch.ops.vllm_plugin_tm.cpu_isas()
    return tuple(names.split(",")) if names else ()


def get_isa() -> str:
    """The instruction set in use in this process; "none" where there is no kernel."""
    import torch

    load()
    return torch.ops.vllm_plugin_tm.get_isa()


def set_isa(name: str) -> None:
    """Selects the instruction set of this process, `name` being one of cpu_isas().

    Raises ValueError for any other name: a higher set than the processor has is refused.
    """
    import torch

    allowed = cpu_isas()
    if name not in allowed:
        raise ValueError(f"instruction set {name!r} is not one of {allowed} on this processor")
    torch.ops.vllm_plugin_tm.set_isa(name)


def _check_devices(
    op: str, first: str, tensor: "Tensor", others: "dict[str, Tensor | None]"
) -> None:
    """One tensor on the meta device among real ones sends a call to the fake, whose result would
    then be taken for a real one."""
    for name, other in others.items():
        if other is not None and other.device != tensor.device:
            raise RuntimeError(
                f"{op}: argument '{name}': expected a tensor on the device of '{first}', "
                f"{tensor.device}, given one on {other.device}"
            )


def _register_fakes() -> None:
    import torch

    @torch.library.register_fake(f"{NAMESPACE}::w4a16_linear")
    def _(x, weight, scale, zero_point, bias, n, group_size):  # type: ignore[no-untyped-def]
        others = {"weight": weight, "scale": scale, "zero_point": zero_point, "bias": bias}
        _check_devices("w4a16_linear", "x", x, others)
        return x.new_empty((*x.shape[:-1], n))

    @torch.library.register_fake(f"{NAMESPACE}::w4a16_pack")
    def _(weight_packed, scale, zero_point, k):  # type: ignore[no-untyped-def]
        others = {"scale": scale, "zero_point": zero_point}
        _check_devices("w4a16_pack", "weight_packed", weight_packed, others)
        n16 = (weight_packed.shape[0] + TILE_N - 1) // TILE_N * TILE_N
        groups = scale.shape[1]
        weight = weight_packed.new_empty((n16, (k + DWORD_K - 1) // DWORD_K))
        zero = (n16 // DWORD_K, groups) if zero_point is not None else (0,)
        return weight, scale.new_empty((n16, groups)), weight_packed.new_empty(zero)
