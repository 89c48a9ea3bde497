# SPDX-License-Identifier: Apache-2.0
"""A row of figures: one kernel on one linear layer or layer of routed experts, and what follows
from its time, bytes and limits."""

from dataclasses import dataclass, field
from typing import ClassVar

from vllm_plugin_tm.bench.cases import Format


@dataclass(frozen=True)
class RowLimits:
    """The limits in the rounds of one case: GB/s (1e9 bytes), GFLOP/s (int8: GOP/s), and whose peak
    that is. `loads_gflops`: the rate of the same product with its operands loaded from the caches,
    measured for tiles of AMX only."""

    read_gbps: float
    dot_gflops: float
    dot_kind: str
    loads_gflops: float | None = None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One kernel on one case of `m` rows of activations. Times in ms per call; bytes as moved by
    one call: weights, scales, zero points and sums of weights in the kernel's layout, x and y.

    `speedups`: peer's kernel name -> the peer's time over this one's, the median over rounds of
    neighbouring samples; only peers that ran.
    """

    LAYERS: ClassVar[str]
    """What is measured, in words."""
    SUBJECT: ClassVar[str]
    """What `subject` is called in tables."""
    BATCH: ClassVar[str]
    """What `m` is called in tables."""

    m: int
    scheme: str
    group_size: int
    symmetric: bool
    dtype: str
    kernel: str
    isa: str
    ms: float
    ms_p10: float
    ms_p90: float
    rounds: int
    bytes: int
    flops: int
    limits: RowLimits
    speedups: dict[str, float] = field(default_factory=dict)

    @property
    def subject(self) -> str:
        """The matrix or layer."""
        raise NotImplementedError

    @property
    def heading(self) -> str:
        """The same with everything that matters."""
        return self.subject

    @property
    def format(self) -> Format:
        return Format(self.group_size, self.symmetric, self.dtype, self.scheme)

    @property
    def gbps(self) -> float:
        return self.bytes / self.ms / 1e6

    @property
    def gflops(self) -> float:
        return self.flops / self.ms / 1e6

    @property
    def intensity(self) -> float:
        """FLOP per byte moved."""
        return self.flops / self.bytes

    @property
    def bandwidth_fraction(self) -> float:
        return self.gbps / self.limits.read_gbps

    @property
    def dot_fraction(self) -> float:
        return self.gflops / self.limits.dot_gflops

    @property
    def loads_fraction(self) -> float | None:
        """Of the products with their loads."""
        loads = self.limits.loads_gflops
        return None if loads is None else self.gflops / loads

    @property
    def roofline_fraction(self) -> float:
        """Of what the nearer limit allows at this intensity: both limits bound FLOP/s, one by
        intensity times bandwidth; the larger fraction is that of the smaller bound."""
        return max(self.bandwidth_fraction, self.dot_fraction)


@dataclass(frozen=True, kw_only=True)
class Row(Figures):
    """Of a linear layer [n, k]."""

    LAYERS = "linear layers"
    SUBJECT = "N x K"
    BATCH = "M"

    n: int
    k: int

    @property
    def subject(self) -> str:
        return f"{self.n} x {self.k}"


@dataclass(frozen=True, kw_only=True)
class MoeRow(Figures):
    """Of a layer of routed experts: fields as in moe_cases.Layer. `touched`: experts that a call
    touches, averaged over the routings; `bytes` has the weights of so many."""

    LAYERS = "routed experts"
    SUBJECT = "layer"
    BATCH = "T"

    model: str
    experts: int
    hidden: int
    intermediate: int
    top_k: int
    touched: float

    @property
    def subject(self) -> str:
        return self.model

    @property
    def heading(self) -> str:
        return (
            f"{self.model}: {self.experts} experts, top {self.top_k}, "
            f"{self.hidden} to {self.intermediate} and back"
        )
