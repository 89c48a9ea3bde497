# SPDX-License-Identifier: Apache-2.0
"""The start-up self-test: a small product of each kernel in use against plain float64 torch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_plugin_tm.kernels import ops

# One tile and a ragged rest in every direction: two groups, two 16-row blocks with 5 rows over,
# row counts on both sides of the decode/prefill border.
_N, _K, _GROUP = 37, 64, 32
_ROWS = (1, 5, 67)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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


_passed: set[tuple[str, str]] = set()


def run(scheme: str) -> Result:
    """Tests the kernel of `scheme` on the instruction set in use, every activation dtype.

    Raises KeyError for a scheme without a kernel; ops.ExtensionMissingError without the extension.
    """
    ops.load()
    return _TESTS[scheme]()


def require(scheme: str) -> None:
    """Runs the test once per scheme and instruction set in this process.

    Raises SelfTestError naming kernel, instruction set, the case and the deviation.
    """
    ops.load()
    key = (scheme, ops.get_isa())
    if key in _passed:
        return
    result = run(scheme)
    if not result.ok:
        raise SelfTestError(
            f"self-test of {result.kernel} on {result.isa} failed: {result.detail} deviates "
            f"{result.error:.3g} times as far from the float64 result as rounding explains. Set "
            "VLLM_PLUGIN_TM_ISA to another instruction set or VLLM_PLUGIN_TM=0, and report it."
        )
    _passed.add(key)


def _w4a16() -> Result:
    worst = 0.0
    detail = "no case"
    for dtype in _DTYPES:
        for asymmetric in (False, True):
            for rows in _ROWS:
                error = _w4a16_error(dtype, asymmetric, rows)
                if not error <= worst:  # also true for NaN
                    worst = error
                    detail = f"M={rows} N={_N} K={_K} group={_GROUP} {dtype} {asymmetric=}"
    return Result("w4a16_linear", ops.get_isa(), worst, worst <= 1.0, detail)


def _w4a16_error(dtype: torch.dtype, asymmetric: bool, rows: int) -> float:
    """The largest deviation from the oracle, in units of the oracle's own tolerance."""
    from vllm_plugin_tm.kernels import reference

    x, codes, scale, zero_point, bias = _w4a16_case(dtype, rows)
    zeros = zero_point if asymmetric else None
    packed = torch.ops.vllm_plugin_tm.w4a16_pack(codes, scale, zeros, _K)
    y = torch.ops.vllm_plugin_tm.w4a16_linear(
        x, packed[0], packed[1], packed[2] if asymmetric else None, bias, _N, _GROUP
    )
    want = reference.w4a16_linear(x, codes, scale, zeros, bias)
    allowed = reference.w4a16_tolerance(x, codes, scale, zeros, bias)
    # max() would drop a NaN's meaning; a comparison that fails does not.
    ratio = (y.double() - want).abs() / allowed
    return float("inf") if bool(ratio.isnan().any()) else float(ratio.max())


def _w4a16_case(dtype: torch.dtype, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fixed input: x [rows, K], codes [N, K/8], scale [N, G], zero points [ceil(N/8), G], bias."""
    # Everything names its device and dtype: the model loader sets other defaults around us.
    generator = torch.Generator(device="cpu").manual_seed(20)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32).to(dtype)

    def words(*shape: int) -> Tensor:
        return torch.randint(
            -(2**31), 2**31, shape, generator=generator, device="cpu", dtype=torch.int64
        ).to(torch.int32)

    groups = _K // _GROUP
    return (
        normal(rows, _K),
        words(_N, _K // 8),
        normal(_N, groups),
        words(-(-_N // 8), groups),
        normal(_N),
    )


_TESTS = {"w4a16": _w4a16}
