# SPDX-License-Identifier: Apache-2.0
"""Made-up reports with round numbers, for the tests beside."""

import dataclasses

from vllm_plugin_tm.bench.cases import Case, Format
from vllm_plugin_tm.bench.figures import RowLimits
from vllm_plugin_tm.bench.limits import Limits
from vllm_plugin_tm.bench.machine import Machine
from vllm_plugin_tm.bench.moe_cases import LAYERS, MoeCase
from vllm_plugin_tm.bench.results import Measured, PackRow, Report, moe_rows_of, rows_of
from vllm_plugin_tm.bench.timing import Samples
from vllm_plugin_tm.quantization.support_matrix import CHANNEL

MACHINE = Machine(
    cpu="Made-up CPU",
    flags=("avx2",),
    cpus=2,
    threads=2,
    llc_bytes=32 * 2**20,
    llc_known=True,
    versions={"torch": "2.13.0"},
    load=0.1,
)


def limits(read: float = 40.0, dot: float = 400.0, int8: float = 0.0) -> Limits:
    return Limits(read, read, {"bf16": dot, "int8": int8, "fma32": dot / 2})


def samples(ms: float) -> Samples:
    """Three rounds, the middle one being `ms`."""
    return Samples((ms * 0.9e-3, ms * 1e-3, ms * 1.1e-3))


def rows(m: int = 1, asymmetric: bool = False, upstream_ms: float = 1.6, isa: str = "avx512bf16"):
    """Rows of a 4096 x 4096 case in which ours takes 0.25 ms and moves 8 MB of weights."""
    case, even = Case(4096, 4096, m, Format(symmetric=not asymmetric)), not asymmetric
    limits = RowLimits(40.0, 400.0, "bf16")
    measured = [Measured("tm", isa, even, 8_000_000, samples(0.25), limits)]
    if asymmetric:
        twin = Measured("tm-symmetric", isa, True, 7_900_000, samples(0.24), limits)
        measured.append(twin)
    measured.append(Measured("upstream", "", even, 8_000_000, samples(upstream_ms), limits))
    measured.append(Measured("torch", "", even, 33_554_432, samples(1.0), limits))
    return rows_of(case, measured)


def integer_rows(
    form: Format, m: int = 1, n: int = 4096, isa: str = "avx512bf16", **peer_ms: float
):
    """Rows of an n x 4096 case with 8-bit activations in which ours takes 0.5 ms and moves 16 MB of
    weights, against an integer dot of 800 GOP/s; `peer_ms` has "_" for "-"."""
    case = Case(n, 4096, m, form)
    rest = (form.symmetric, 16_000_000)
    limits = RowLimits(40.0, 800.0, "int8")
    measured = [Measured("tm", isa, *rest, samples(0.5), limits)]
    for name, ms in peer_ms.items():
        measured.append(Measured(name.replace("_", "-"), "", *rest, samples(ms), limits))
    return rows_of(case, measured)


def moe_rows(
    m: int = 1,
    scheme: str = "w4a16",
    ms: float = 0.5,
    layer: str = "mixtral",
    isa: str = "avx512bf16",
):
    """Rows of a layer of experts that moves 16 MB of the weights of 2.5 of them, with upstream in
    bf16 at 2 ms."""
    case = MoeCase(LAYERS[layer], m, Format(scheme=scheme))
    limits = RowLimits(40.0, 400.0, "bf16")
    measured = [
        Measured("tm", isa, True, 16_000_000, samples(ms), limits),
        Measured("upstream-bf16", "", True, 64_000_000, samples(2.0), limits),
    ]
    return moe_rows_of(case, measured, touched=2.5)


def moe_report() -> Report:
    """Two layers of experts, and an integer scheme."""
    return dataclasses.replace(
        report(),
        rows=(),
        packing=(),
        skipped=("upstream-bf16: made-up reason",),
        moe=(
            *moe_rows(),
            *moe_rows(m=64, ms=1.0),
            *moe_rows(m=16, layer="qwen3-30b-a3b", ms=0.7),
            *moe_rows(m=1024, ms=9000.0),
            *moe_rows(scheme="w8a8"),
        ),
    )


def report(before: Limits | None = None, after: Limits | None = None) -> Report:
    pack = PackRow(4096, 4096, "w4a16", 128, True, "bf16", 2.0, 1.9, 2.2, 7, 8_388_608, 1.0)
    return Report(
        date="2026-01-02 03:04 UTC",
        command="vllm-tm bench --quick",
        machine=MACHINE,
        before=before or limits(),
        after=after or limits(),
        rows=(*rows(), *rows(m=128), *rows(asymmetric=True)),
        packing=(pack,),
        skipped=("upstream: made-up reason",),
    )


def mixed_report() -> Report:
    """The report above, and integer schemes in it."""
    eight, four = Format(CHANNEL, scheme="w8a8"), Format(scheme="w4a8")
    return dataclasses.replace(
        report(limits(int8=800.0), limits(int8=800.0)),
        rows=(
            *integer_rows(eight, upstream=0.6),
            *integer_rows(eight, n=576, upstream=0.4),
            *integer_rows(four, upstream=40.0, upstream_w8a8=0.6, zentorch=0.55),
            *integer_rows(four, m=256, upstream_w8a8=0.6, zentorch=0.7),
            *report().rows,
        ),
    )
