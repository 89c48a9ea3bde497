# SPDX-License-Identifier: Apache-2.0
"""The compiled ops: loading the extension, their fakes, and the instruction set they run on."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NAMESPACE = "vllm_plugin_tm"
EXTENSION = "_C.abi3.so"
CUDA_EXTENSION = "_cuda.abi3.so"  # the same ops for tensors on a GPU; only where it was built

# Geometry of the kernel layout, as csrc/cpu/layout.h has it.
TILE_N = 16
DWORD_BITS = 32
# The same of a GPU's, as csrc/cuda/layout.h has it.
CUDA_TILE = 64
CUDA_SMALL_GROUP = 32


class ExtensionMissingError(RuntimeError):
    """The compiled extension is not there or cannot be loaded; says why, and the cure."""


def extension_path() -> Path | None:
    """Where the extension lies, or None. An editable install keeps it apart from the sources."""
    return _find(EXTENSION)


def _find(name: str) -> Path | None:
    import vllm_plugin_tm

    for directory in vllm_plugin_tm.__path__:
        path = Path(directory) / name
        if path.is_file():
            return path
    return None


@functools.cache
def load() -> None:
    """Loads the extension into torch, and that for GPUs where it was built, and registers the
    fakes; idempotent.

    Raises ExtensionMissingError with the reason.
    """

    path = extension_path()
    if path is None:
        raise ExtensionMissingError(
            f"vllm-plugin-tm: the compiled extension {EXTENSION} is missing from the installed "
            "package; build it with `pip install .` in the source tree (needs g++ 11 or newer)"
        )
    _load_library(path, "2.11")
    cuda = _find(CUDA_EXTENSION)
    if cuda is not None:
        _load_library(cuda, "2.13")
    _register_fakes()


def _load_library(path: Path, oldest_torch: str) -> None:
    import torch

    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ExtensionMissingError(
            f"vllm-plugin-tm: {path} cannot be loaded with torch {torch.__version__}: {error}; "
            f"it needs torch {oldest_torch} or newer"
        ) from error


def is_available() -> bool:
    """True where the extension can be loaded."""
    try:
        load()
    except (ExtensionMissingError, ImportError):
        return False
    return True


def has_cuda() -> bool:
    """True where the extension was built with kernels for GPUs."""
    return _find(CUDA_EXTENSION) is not None


def advise_huge_pages(tensor: "Tensor") -> None:
    """Asks the system for huge pages below a tensor that is not written yet: a hint, which comes to
    nothing on other devices and without the extension."""
    if tensor.is_cpu and is_available():
        import torch

        torch.ops.vllm_plugin_tm.advise_huge_pages(tensor)


def release_pages(tensor: "Tensor") -> None:
    """Gives back the memory below a tensor that no one reads any more, whole pages of it; nothing
    on other devices than the CPU."""
    if tensor.is_cpu:
        import torch

        torch.ops.vllm_plugin_tm.release_pages(tensor)


def cpu_isas() -> tuple[str, ...]:
    """Instruction sets this processor can run, best first; empty where there is no kernel."""
    import torch

    load()
    names = torch.ops.vllm_plugin_tm.cpu_isas()
    return tuple(names.split(",")) if names else ()


def amx_problem() -> str:
    """Why a processor with AMX does not run on it, in one line; empty where it does, and where the
    processor has none."""
    import torch

    load()
    return torch.ops.vllm_plugin_tm.amx_problem()


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
        message = f"instruction set {name!r} is not one of {allowed} on this processor"
        problem = amx_problem() if name == "amx" else ""
        raise ValueError(f"{message}: {problem}" if problem else message)
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
    for bits in (4, 8):
        _register_grouped_pack(f"w{bits}a16_pack", bits)
        _register_grouped_linear(f"w{bits}a16_linear")
    _register_grouped_linear("w4a8_linear")
    _register_float_linears()
    _register_w8a8()
    for scheme in ("w4a16", "w8a16", "w4a8", "w8a8", "fp8", "fp4"):
        _register_moe(f"{scheme}_moe")


def padded(n: int, tile: int = TILE_N) -> int:
    """Channels of the CPU's kernel layout for n output channels, or whole tiles of other sizes."""
    return (n + tile - 1) // tile * tile


def _packed_rows(n: int, gate_up: bool) -> int:
    """Channels of the kernel layout for n rows of a checkpoint; gates and ups are padded apart."""
    return 2 * padded(n // 2) if gate_up else padded(n)


def _register_grouped_pack(name: str, bits: int) -> None:
    import torch

    per_dword = DWORD_BITS // bits

    @torch.library.register_fake(f"{NAMESPACE}::{name}")
    def _(weight_packed, scale, zero_point, k, bits=bits, gate_up=False):  # type: ignore[no-untyped-def]
        others = {"scale": scale, "zero_point": zero_point}
        _check_devices(name, "weight_packed", weight_packed, others)
        groups = scale.shape[1]
        if weight_packed.is_cuda:
            return _cuda_pack_fake(weight_packed, scale, zero_point, k, gate_up)
        n = _packed_rows(weight_packed.shape[0], gate_up)
        zero = (n // per_dword, groups) if zero_point is not None else (0,)
        return (
            weight_packed.new_empty((n, (k + per_dword - 1) // per_dword), dtype=torch.int32),
            scale.new_empty((n, groups)),
            weight_packed.new_empty(zero, dtype=torch.int32),
        )


def cuda_pack_shapes(n: int, k: int, groups: int, bits: int = 4) -> tuple[tuple[int, int], ...]:
    """Shapes of weights of 4 or 8 bits, scales and zero points [n, k] in a GPU's kernel layout."""
    rows, columns = (padded(size, CUDA_TILE) for size in (n, k))
    halves = groups > 1 and k // groups == CUDA_SMALL_GROUP
    scales = columns // CUDA_SMALL_GROUP if halves else groups
    return (rows, columns * bits // DWORD_BITS), (rows, scales), (rows // 8, scales)


def _cuda_pack_fake(weight_packed, scale, zero_point, k, gate_up):  # type: ignore[no-untyped-def]
    import torch

    rows = weight_packed.shape[0]
    channels = _packed_rows(rows, gate_up) if gate_up else rows
    weight, steps, zero = cuda_pack_shapes(channels, k, scale.shape[1])
    return (
        weight_packed.new_empty(weight, dtype=torch.int32),
        scale.new_empty(steps),
        weight_packed.new_empty(zero if zero_point is not None else (0,), dtype=torch.int32),
    )


def _register_grouped_linear(name: str) -> None:
    import torch

    @torch.library.register_fake(f"{NAMESPACE}::{name}")
    def _(x, weight, scale, zero_point, bias, n, group_size, x_groups=False):  # type: ignore[no-untyped-def]
        others = {"weight": weight, "scale": scale, "zero_point": zero_point, "bias": bias}
        _check_devices(name, "x", x, others)
        return x.new_empty((*x.shape[:-1], n))


def _register_float_linears() -> None:
    import torch

    @torch.library.register_fake(f"{NAMESPACE}::fp8_linear")
    def _(  # type: ignore[no-untyped-def]
        x, weight, scale, bias, n, group_size, x_rounding, x_scale=None, x_group_size=-1
    ):
        others = {"weight": weight, "scale": scale, "bias": bias, "x_scale": x_scale}
        _check_devices("fp8_linear", "x", x, others)
        return x.new_empty((*x.shape[:-1], n))

    @torch.library.register_fake(f"{NAMESPACE}::fp4_linear")
    def _(x, weight, scale, channel_scale, bias, n, group_size, scale_type):  # type: ignore[no-untyped-def]
        others = {"weight": weight, "scale": scale, "channel_scale": channel_scale, "bias": bias}
        _check_devices("fp4_linear", "x", x, others)
        return x.new_empty((*x.shape[:-1], n))


def _register_w8a8() -> None:
    import torch

    @torch.library.register_fake(f"{NAMESPACE}::w8a8_pack")
    def _(weight, scale, gate_up=False):  # type: ignore[no-untyped-def]
        _check_devices("w8a8_pack", "weight", weight, {"scale": scale})
        n, k = weight.shape
        if weight.is_cuda:
            n = _packed_rows(n, gate_up) if gate_up else n
            codes, steps, _ = cuda_pack_shapes(n, k, 1, bits=8)
            return (
                weight.new_empty(codes, dtype=torch.int32),
                scale.new_empty(steps),
                weight.new_empty((codes[0],), dtype=torch.int32),
            )
        n = _packed_rows(n, gate_up)
        return (
            weight.new_empty((n, (k + 3) // 4), dtype=torch.int32),
            scale.new_empty((n, 1)),
            weight.new_empty((n,), dtype=torch.int32),
        )

    @torch.library.register_fake(f"{NAMESPACE}::w8a8_linear")
    def _(  # type: ignore[no-untyped-def]
        x,
        weight,
        scale,
        weight_sum,
        bias,
        n,
        x_scale=None,
        x_zero_point=None,
        x_symmetric=True,
    ):
        others = {
            "weight": weight,
            "scale": scale,
            "weight_sum": weight_sum,
            "bias": bias,
            "x_scale": x_scale,
            "x_zero_point": x_zero_point,
        }
        _check_devices("w8a8_linear", "x", x, others)
        return x.new_empty((*x.shape[:-1], n))


def _register_moe(name: str) -> None:
    import torch

    if name.startswith("fp"):
        third = "channel_scale"
    else:
        third = "weight_sum" if name.startswith("w8a8") else "zero_point"
    parts = ("", "_scale", f"_{third}", "_bias")
    weights = [f"{product}{part}" for product in ("w13", "w2") for part in parts]
    numbers = ("intermediate_size", "activation", "alpha", "beta", "limit")
    more = {
        "w4a8_moe": ("x_groups",),
        "fp8_moe": ("x_rounding", "w13_x_scale", "w2_x_scale", "x_group_size"),
        "fp4_moe": ("scale_type",),
    }.get(name, ())
    names = ("x", "topk_weights", "topk_ids", *weights, *numbers, "expert_map", *more)

    @torch.library.register_fake(f"{NAMESPACE}::{name}")
    def _(*arguments, **named):  # type: ignore[no-untyped-def]
        given = dict(zip(names, arguments, strict=False)) | named
        x = given.pop("x")
        tensors = ("topk_weights", "topk_ids", *weights, "expert_map", "w13_x_scale", "w2_x_scale")
        _check_devices(name, "x", x, {key: given.get(key) for key in tensors})
        return x.new_empty(x.shape)
