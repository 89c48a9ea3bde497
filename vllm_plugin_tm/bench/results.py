# SPDX-License-Identifier: Apache-2.0
"""What a run yields: rows of figures from samples, the whole report, and it as JSON."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from vllm_plugin_tm.bench.cases import Case, Format
from vllm_plugin_tm.bench.figures import Figures, MoeRow, Row, RowLimits
from vllm_plugin_tm.bench.limits import Limits
from vllm_plugin_tm.bench.machine import Machine
from vllm_plugin_tm.bench.moe_cases import MoeCase
from vllm_plugin_tm.bench.timing import Samples, ratio

SCHEMA = 2


_DERIVED = (
    "gbps",
    "gflops",
    "bandwidth_fraction",
    "dot_fraction",
    "loads_fraction",
    "roofline_fraction",
)


@dataclass(frozen=True)
class PackRow:
    """Packing one matrix from disk order to kernel layout. `disk_bytes` are those of the codes;
    `resident_ratio` is kernel layout over disk tensors, scales, zero points and sums included."""

    n: int
    k: int
    scheme: str
    group_size: int
    symmetric: bool
    dtype: str
    ms: float
    ms_p10: float
    ms_p90: float
    rounds: int
    disk_bytes: int
    resident_ratio: float

    @property
    def format(self) -> Format:
        return Format(self.group_size, self.symmetric, self.dtype, self.scheme)

    @property
    def gbps(self) -> float:
        return self.disk_bytes / self.ms / 1e6


@dataclass(frozen=True)
class Report:
    """A whole run. `skipped` says what was not measured and why."""

    date: str
    command: str
    machine: Machine
    before: Limits
    after: Limits
    rows: tuple[Row, ...]
    packing: tuple[PackRow, ...]
    skipped: tuple[str, ...]
    moe: tuple[MoeRow, ...] = ()

    @property
    def figures(self) -> tuple[Figures, ...]:
        """All rows of kernels."""
        return (*self.rows, *self.moe)


@dataclass(frozen=True)
class Measured:
    """One kernel's part in a case: its name, instruction set, whether its weights have no zero
    points, their bytes, its samples, and its limits in the same rounds."""

    kernel: str
    isa: str
    symmetric: bool
    weight_bytes: int
    samples: Samples
    limits: RowLimits


def rows_of(case: Case, measured: list[Measured]) -> list[Row]:
    """The rows of one case.

    Everyone is compared with every other kernel; where one ran on several instruction sets, with
    the first.
    """
    others = _first_of_each(measured)
    return [Row(n=case.n, k=case.k, **_figures(case, one, others)) for one in measured]


def moe_rows_of(case: MoeCase, measured: list[Measured], touched: float) -> list[MoeRow]:
    """As rows_of; the measured bytes are those of `touched` experts."""
    own = {**asdict(case.layer), "touched": touched}
    others = _first_of_each(measured)
    return [MoeRow(**own, **_figures(case, one, others)) for one in measured]


def _first_of_each(measured: list[Measured]) -> dict[str, Measured]:
    first: dict[str, Measured] = {}
    for one in measured:
        first.setdefault(one.kernel, one)
    return first


def _figures(case: Case | MoeCase, own: Measured, others: dict[str, Measured]) -> dict[str, Any]:
    """The fields of Figures."""
    form = case.format
    return {
        "m": case.m,
        "scheme": form.scheme,
        "group_size": form.group_size,
        "symmetric": own.symmetric,
        "dtype": form.dtype,
        "kernel": own.kernel,
        "isa": own.isa,
        **_times(own.samples),
        "bytes": own.weight_bytes + case.activation_bytes,
        "flops": case.flops,
        "limits": own.limits,
        "speedups": {
            kernel: ratio(other.samples, own.samples)
            for kernel, other in others.items()
            if kernel != own.kernel
        },
    }


def pack_row(case: Case, samples: Samples, disk_bytes: int, resident_ratio: float) -> PackRow:
    """The packing row of a case's matrix; m does not matter."""
    form = case.format
    return PackRow(
        n=case.n,
        k=case.k,
        scheme=form.scheme,
        group_size=form.group_size,
        symmetric=form.symmetric,
        dtype=form.dtype,
        **_times(samples),
        disk_bytes=disk_bytes,
        resident_ratio=resident_ratio,
    )


def _times(samples: Samples) -> dict[str, Any]:  # Any: the counts are int, the times float
    return {
        "ms": samples.median * 1e3,
        "ms_p10": samples.quantile(0.1) * 1e3,
        "ms_p90": samples.quantile(0.9) * 1e3,
        "rounds": len(samples.seconds),
    }


def to_json(report: Report) -> str:
    """The report with the derived figures written out, so that a reader needs no formulas."""
    data = {"schema": SCHEMA, **asdict(report)}
    for target, row in zip((*data["rows"], *data["moe"]), report.figures, strict=True):
        target.update({name: getattr(row, name) for name in _DERIVED})
    for target, pack in zip(data["packing"], report.packing, strict=True):
        target["gbps"] = pack.gbps
    return json.dumps(data, indent=1) + "\n"


def from_json(text: str) -> Report:
    """The inverse of to_json; derived figures are computed again.

    Raises:
        ValueError: another schema, or text that is no report.
    """
    data = json.loads(text)
    found = data.get("schema") if isinstance(data, dict) else None
    if found != SCHEMA:
        raise ValueError(
            f"not a report of `vllm-tm bench --json`: schema {found!r}, known {SCHEMA}"
        )
    return Report(
        date=data["date"],
        command=data["command"],
        machine=machine_from(data["machine"]),
        before=_build(Limits, data["before"]),
        after=_build(Limits, data["after"]),
        rows=_rows(Row, data["rows"]),
        packing=tuple(_build(PackRow, row) for row in data["packing"]),
        skipped=tuple(data["skipped"]),
        moe=_rows(MoeRow, data.get("moe", [])),  # older files have none
    )


def _rows(kind: type, data: list[dict[str, Any]]) -> tuple[Any, ...]:
    return tuple(_build(kind, {**row, "limits": _build(RowLimits, row["limits"])}) for row in data)


def machine_from(data: dict[str, Any]) -> Machine:
    """The machine from its part of a JSON file."""
    return _build(Machine, data)


def _build(kind: type, values: dict[str, Any]) -> Any:
    """A dataclass from its own fields of `values`; JSON's lists become the tuples they were."""
    own = {field.name for field in fields(kind)}
    return kind(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
            if name in own
        }
    )
