# SPDX-License-Identifier: Apache-2.0
"""The schemes that are measured: bits of weights and activations, and their usual formats. No
torch."""

from dataclasses import dataclass

from vllm_plugin_tm.quantization.support_matrix import CHANNEL


@dataclass(frozen=True)
class Floats:
    """Weights that are small floats.

    `op`: "fp8" for e4m3, "fp4" for e2m1, and so the prefix of the ops' names. `x_rounding` is what
    fp8 ops do to x: "none", or e4m3 with a scale per "token" or per "group", those of the weights.
    `block`: a scale is shared by as many output channels as a group has inputs. `scale_type`, of
    fp4, is "e8m0" or "e4m3"; with the latter there is a scale per output channel too, float32.
    """

    op: str
    x_rounding: str = "none"
    block: bool = False
    scale_type: str = ""

    @property
    def channel_scales(self) -> bool:
        return self.scale_type == "e4m3"


@dataclass(frozen=True)
class Scheme:
    """A pair of weight and activation widths, or a format of small floats.

    `integer_activations`: x is rounded to 8-bit integers, with a scale per row, as part of the op.
    `usual_group` is measured at every batch size, `other_formats`, (group size, symmetric), at
    some. `groups` are the only sizes that there are, none for any. `floats` is None for integers.
    """

    name: str
    weight_bits: int
    integer_activations: bool
    usual_group: int
    other_formats: tuple[tuple[int, bool], ...] = ()
    groups: tuple[int, ...] = ()
    floats: Floats | None = None

    @property
    def title(self) -> str:
        """As it is written in tables."""
        return self.name.upper().replace("-", " ")

    @property
    def grouped(self) -> bool:
        """Whether weights may have a scale per group of K and, integers, zero points; else they
        have one scale per output channel, and "asymmetric" speaks of the activations."""
        return self.groups != (CHANNEL,)

    @property
    def rounds_activations(self) -> bool:
        """Whether the op rounds x, to integers or to e4m3."""
        rounding = self.floats.x_rounding if self.floats else "none"
        return self.integer_activations or rounding != "none"


_INTEGERS = (
    Scheme("w4a16", 4, False, 128, ((32, True), (64, True), (CHANNEL, True), (128, False))),
    Scheme("w8a16", 8, False, 128, ((CHANNEL, True), (128, False))),
    Scheme("w4a8", 4, True, 128, ((32, True), (64, True), (CHANNEL, True))),
    Scheme("w8a8", 8, True, CHANNEL, ((CHANNEL, False),), (CHANNEL,)),
)
_FLOATS = (
    Scheme("fp8-w8a8", 8, False, CHANNEL, (), (CHANNEL,), Floats("fp8", "token")),
    Scheme("fp8-block", 8, False, 128, floats=Floats("fp8", "group", block=True)),
    Scheme("fp8-w8a16", 8, False, CHANNEL, ((128, True),), floats=Floats("fp8")),
    Scheme("mxfp4", 4, False, 32, (), (32,), Floats("fp4", scale_type="e8m0")),
    Scheme("nvfp4", 4, False, 16, (), (16,), Floats("fp4", scale_type="e4m3")),
)
SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in (*_INTEGERS, *_FLOATS)}
"""By name, in the order of measuring."""
USUAL_SCHEME = "w4a16"
DEFAULT_SCHEMES = tuple(scheme.name for scheme in _INTEGERS)
"""Those of a run without options, which has to end in about ten minutes."""
FAMILIES: dict[str, tuple[str, ...]] = {
    family: tuple(s.name for s in _FLOATS if s.floats and s.floats.op == family)
    for family in ("fp8", "fp4")
}
"""Names for several schemes at once: all that one op computes."""
