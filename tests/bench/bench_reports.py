# SPDX-License-Identifier: Apache-2.0
"""Made-up reports with round numbers, for the tests beside."""

from vllm_plugin_tm.bench.cases import Case, Format
from vllm_plugin_tm.bench.limits import Limits
from vllm_plugin_tm.bench.machine import Machine
from vllm_plugin_tm.bench.results import Measured, PackRow, Report, RowLimits, rows_of
from vllm_plugin_tm.bench.timing import Samples

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


def limits(read: float = 40.0, dot: float = 400.0) -> Limits:
    return Limits(read, read, {"bf16": dot, "int8": 0.0, "fma32": dot / 2})


def samples(ms: float) -> Samples:
    """Three rounds, the middle one being `ms`."""
    return Samples((ms * 0.9e-3, ms * 1e-3, ms * 1.1e-3))


def rows(m: int = 1, asymmetric: bool = False, upstream_ms: float = 1.6):
    """Rows of a 4096 x 4096 case in which ours takes 0.25 ms and moves 8 MB of weights."""
    case = Case(4096, 4096, m, Format(symmetric=not asymmetric))
    measured = [Measured("tm", "avx512bf16", not asymmetric, 8_000_000, samples(0.25))]
    if asymmetric:
        twin = Measured("tm-symmetric", "avx512bf16", True, 7_900_000, samples(0.24))
        measured.append(twin)
    measured.append(Measured("upstream", "", not asymmetric, 8_000_000, samples(upstream_ms)))
    measured.append(Measured("torch", "", not asymmetric, 33_554_432, samples(1.0)))
    return rows_of(case, measured, RowLimits(40.0, 400.0, "bf16"))


def report(before: Limits | None = None, after: Limits | None = None) -> Report:
    pack = PackRow(4096, 4096, 128, True, "bf16", 2.0, 1.9, 2.2, 7, 8_388_608, 1.0)
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
