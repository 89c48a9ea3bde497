# SPDX-License-Identifier: Apache-2.0
"""The start-up self-test: a small product of each kernel in use against plain float64 torch."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_plugin_tm import envs, machine
from vllm_plugin_tm.kernels import ops

# One tile and a ragged rest in every direction: two groups, two 16-row blocks with 5 rows over,
# row counts on both sides of the decode/prefill border.
_N, _K, _GROUP = 37, 64, 32
_ROWS = (1, 5, 67)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Kernels for GPUs have no others.
_CUDA_DTYPES = _DTYPES[:2]
# What static activations are rounded with: a few of 64 normal values are clamped.
_X_SCALE, _X_ZERO_POINT = 0.018, -37


class SelfTestError(RuntimeError):
    """A kernel computes something else than its definition on this machine."""


@dataclass(frozen=True)
class Result:
    """One kernel's self-test: `error` is the largest deviation in units of what rounding explains
    (above 1 is a failure), `ok` the verdict, `detail` the case in words."""

    kernel: str
    isa: str
    error: float
    ok: bool
    detail: str


logger = logging.getLogger("vllm.plugin_tm")

_results: dict[tuple[str, str], Result] = {}


def run(scheme: str) -> Result:
    """Tests the kernel of `scheme`, for routed experts of `scheme`_moe, on this process's device
    and the instruction set in use, every activation dtype.

    Raises KeyError for a scheme without a kernel; ops.ExtensionMissingError without the extension.
    """
    ops.load()
    return _TESTS[scheme]()


def kernels() -> tuple[str, ...]:
    """What `run` takes on this process's device."""
    return tuple(_TESTS) if machine.device() == "cpu" else _ON_CUDA


def require(scheme: str) -> None:
    """Runs the test once per scheme and instruction set in this process.

    Raises SelfTestError naming kernel, instruction set, the case and the deviation.
    """
    problem = _problem(scheme)
    if problem:
        raise SelfTestError(
            f"{problem}. Set VLLM_PLUGIN_TM_ISA to another instruction set or VLLM_PLUGIN_TM=0, "
            "and report it."
        )


def gpu_failure(scheme: str) -> str | None:
    """Why a GPU's kernel of `scheme` is not to be used: it failed its test, which is logged once,
    and upstream has kernels for its layers. None where it passed, and on CPUs, where `require` is
    the one to speak: there upstream may have nothing."""
    return None if machine.device() == "cpu" else _problem(scheme)


def _problem(scheme: str) -> str | None:
    """What the test of a scheme's kernel says, run once; a failure on a GPU is logged then."""
    ops.load()
    key = (scheme, _isa())
    tested = key in _results
    result = _results[key] if tested else _results.setdefault(key, run(scheme))
    if result.ok:
        return None
    problem = (
        f"self-test of {result.kernel} on {result.isa} failed: {result.detail} deviates "
        f"{result.error:.3g} times as far from the float64 result as rounding explains"
    )
    if not tested and machine.device() == "cuda":
        logger.error("%s: its layers are left to upstream. Please report it.", problem)
    return problem


def _isa() -> str:
    return ops.get_isa() if machine.device() == "cpu" else str(machine.detect().isa)


def dtypes() -> tuple[torch.dtype, ...]:
    """Those of activations that this process's device has kernels for."""
    return _DTYPES if machine.device() == "cpu" else _CUDA_DTYPES


def there(tensor: Tensor | None) -> Tensor | None:
    """A tensor of the host on this process's device."""
    return None if tensor is None else tensor.to(machine.device())


@dataclass(frozen=True)
class _Inputs:
    """Fixed input: x [rows, K], packed 4-bit codes [N, K/8] and zero points [ceil(N/8), G], bytes
    [N, K] and their zero points [ceil(N/4), G], scale [N, G], bias [N]; weights e4m3 [N, K], e2m1
    pairs [N, K/2] and bytes that are scales of either kind [N, G]."""

    x: Tensor
    nibbles: Tensor
    nibble_zeros: Tensor
    bytes: Tensor
    byte_zeros: Tensor
    scale: Tensor
    bias: Tensor
    float8: Tensor
    float4: Tensor
    float4_scale: Tensor


# An error in units of the oracle's own tolerance: how far the kernel is from it on one input.
_Error = Callable[[_Inputs], float]


def _test(scheme: str, variants: dict[str, _Error]) -> Result:
    """The worst of all variants, activation dtypes and row counts."""
    worst = 0.0
    detail = "no case"
    for dtype in dtypes():
        for rows in _ROWS:
            inputs = _inputs(dtype, rows)
            for variant, error_of in variants.items():
                error = error_of(inputs)
                if not error <= worst:  # also true for NaN
                    worst = error
                    detail = f"M={rows} N={_N} K={_K} group={_GROUP} {dtype} {variant}"
    return Result(f"{scheme}_linear", _isa(), worst, worst <= 1.0, detail)


def _deviation(scheme: str, y: Tensor, *arguments: object) -> float:
    from vllm_plugin_tm.kernels import reference, reference_float, reference_int8

    if scheme.startswith("fp"):
        oracle = reference_float
    else:
        oracle = reference if scheme.endswith("a16") else reference_int8
    want = getattr(oracle, f"{scheme}_linear")(*arguments)
    allowed = getattr(oracle, f"{scheme}_tolerance")(*arguments)
    # max() would drop a NaN's meaning; a comparison that fails does not.
    ratio = (y.cpu().double() - want).abs() / allowed
    return float("inf") if bool(ratio.isnan().any()) else float(ratio.max())


def _grouped_error(
    scheme: str, asymmetric: bool, x_groups: tuple[bool, ...], inputs: _Inputs
) -> float:
    namespace = torch.ops.vllm_plugin_tm
    if scheme == "w8a16":
        pack, codes, zeros = namespace.w8a16_pack, inputs.bytes, inputs.byte_zeros
    else:
        pack, codes, zeros = namespace.w4a16_pack, inputs.nibbles, inputs.nibble_zeros
    disk_zeros = zeros if asymmetric else None
    weight, scale, zero = pack(there(codes), there(inputs.scale), there(disk_zeros), _K)
    y = getattr(namespace, f"{scheme}_linear")(
        *(there(inputs.x), weight, scale, zero if asymmetric else None, there(inputs.bias)),
        *(_N, _GROUP, *x_groups),
    )
    arguments = (inputs.x, codes, inputs.scale, disk_zeros, inputs.bias, *x_groups)
    return _deviation(scheme, y, *arguments)


def _w8a8_error(asymmetric: bool, static: bool, inputs: _Inputs) -> float:
    x_scale = torch.tensor([_X_SCALE], dtype=torch.float32, device="cpu") if static else None
    x_zero_point = (
        torch.tensor([_X_ZERO_POINT], dtype=torch.int32, device="cpu")
        if static and asymmetric
        else None
    )
    channel = inputs.scale[:, :1].float().contiguous()
    weight, scale, sums = torch.ops.vllm_plugin_tm.w8a8_pack(there(inputs.bytes), there(channel))
    quantization = (x_scale, x_zero_point, not asymmetric)
    y = torch.ops.vllm_plugin_tm.w8a8_linear(
        *(there(inputs.x), weight, scale, sums, there(inputs.bias), _N),
        *(there(x_scale), there(x_zero_point), not asymmetric),
    )
    return _deviation("w8a8", y, inputs.x, inputs.bytes, channel, inputs.bias, *quantization)


def _fp8_error(rounding: str, inputs: _Inputs) -> float:
    x_scale = torch.tensor([_X_SCALE], dtype=torch.float32, device="cpu")
    more = (rounding, x_scale if rounding == "tensor" else None, -1)
    scale = inputs.scale.float()
    pack = torch.ops.vllm_plugin_tm.w8a16_pack
    weight, scales, _ = pack(inputs.float8.view(torch.int8), scale, None, _K)
    y = torch.ops.vllm_plugin_tm.fp8_linear(
        inputs.x, weight, scales, inputs.bias, _N, _GROUP, *more
    )
    return _deviation("fp8", y, inputs.x, inputs.float8, scale, inputs.bias, *more)


def _fp4_error(scale_type: str, inputs: _Inputs) -> float:
    pack = torch.ops.vllm_plugin_tm.w4a16_pack
    words = inputs.float4.view(torch.int32) ^ -0x77777778  # see small_floats.e2m1_words
    weight, scales, _ = pack(words, inputs.float4_scale, None, _K)
    channels = inputs.scale[:, 0].float()
    padded = torch.nn.functional.pad(channels, (0, ops.padded(_N) - _N))
    y = torch.ops.vllm_plugin_tm.fp4_linear(
        inputs.x, weight, scales, padded, inputs.bias, _N, _GROUP, scale_type
    )
    scale = (inputs.float4_scale, channels)
    return _deviation("fp4", y, inputs.x, inputs.float4, *scale, inputs.bias, scale_type)


def _inputs(dtype: torch.dtype, rows: int) -> _Inputs:
    # Everything names its device and dtype: the model loader sets other defaults around us.
    generator = torch.Generator(device="cpu").manual_seed(20)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32).to(dtype)

    def words(*shape: int) -> Tensor:
        return torch.randint(
            -(2**31), 2**31, shape, generator=generator, device="cpu", dtype=torch.int64
        ).to(torch.int32)

    groups = _K // _GROUP
    float8 = words(_N, _K // 4).view(torch.uint8)
    float8 = torch.where((float8 & 0x7F) == 0x7F, float8 - 1, float8)  # all but not-a-number
    return _Inputs(
        x=normal(rows, _K),
        nibbles=words(_N, _K // 8),
        nibble_zeros=words(-(-_N // 8), groups),
        bytes=words(_N, _K // 4).view(torch.int8),
        byte_zeros=words(-(-_N // 4), groups),
        scale=normal(_N, groups),
        bias=normal(_N),
        float8=float8.view(torch.float8_e4m3fn),
        float4=words(_N, _K // 8).view(torch.uint8),
        # 2**-3 to 2**-1 as e8m0, 320 to 416 as e4m3.
        float4_scale=(words(_N, groups).view(torch.uint8)[:, :groups] % 3 + 0x7C).contiguous(),
    )


def _variants(scheme: str) -> dict[str, _Error]:
    symmetries = {"symmetric": False, "asymmetric": True}
    if scheme == "fp8":
        roundings = ("none", "token", "group", "tensor")
        return {
            f"rounding {rounding}": functools.partial(_fp8_error, rounding)
            for rounding in roundings
        }
    if scheme == "fp4":
        return {f"scales {kind}": functools.partial(_fp4_error, kind) for kind in ("e8m0", "e4m3")}
    if scheme == "w8a8":
        return {
            f"{symmetry} {kind}": functools.partial(_w8a8_error, asymmetric, static)
            for symmetry, asymmetric in symmetries.items()
            for kind, static in (("dynamic", False), ("static", True))
        }
    scales: dict[str, tuple[bool, ...]] = {"": ()}
    if scheme == "w4a8":
        scales = {" per token": (False,), " per token and group": (True,)}
        if machine.device() == "cuda":
            del scales[" per token and group"]
    return {
        symmetry + name: functools.partial(_grouped_error, scheme, asymmetric, x_groups)
        for symmetry, asymmetric in symmetries.items()
        for name, x_groups in scales.items()
    }


def _test_linear(scheme: str) -> Result:
    return _test(scheme, _variants(scheme))


def _test_moe(scheme: str) -> Result:
    from vllm_plugin_tm import selftest_moe

    worst, detail = selftest_moe.worst_case(scheme)
    return Result(f"{scheme}_moe", _isa(), worst, worst <= 1.0, detail)


_TESTS: dict[str, Callable[[], Result]] = {
    **{scheme: functools.partial(_test_linear, scheme) for scheme in envs.SCHEMES},
    **{f"{scheme}_moe": functools.partial(_test_moe, scheme) for scheme in envs.SCHEMES},
}
_ON_CUDA = tuple(f"{scheme}{moe}" for moe in ("", "_moe") for scheme in ("w4a16", "w4a8", "w8a8"))
