# SPDX-License-Identifier: Apache-2.0
"""The schemes that are measured: bits of weights and activations, and their usual formats. No
torch."""

from dataclasses import dataclass

from vllm_plugin_tm.quantization.support_matrix import CHANNEL


@dataclass(frozen=True)
class Scheme:
    """A pair of weight and activation widths.

    `integer_activations`: x is rounded to 8-bit integers, with a scale per row, as part of the op.
    `grouped`: weights may have a scale per group of K, and zero points; else they have one scale
    per output channel, and "asymmetric" speaks of the activations.
    `usual_group` is measured at every batch size, `other_formats`, (group size, symmetric), at
    some.
    """

    name: str
    weight_bits: int
    integer_activations: bool
    grouped: bool
    usual_group: int
    other_formats: tuple[tuple[int, bool], ...]

    @property
    def title(self) -> str:
        """As it is written in tables."""
        return self.name.upper()


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "w4a16", 4, False, True, 128, ((32, True), (64, True), (CHANNEL, True), (128, False))
        ),
        Scheme("w8a16", 8, False, True, 128, ((CHANNEL, True), (128, False))),
        Scheme("w4a8", 4, True, True, 128, ((32, True), (64, True), (CHANNEL, True))),
        Scheme("w8a8", 8, True, False, CHANNEL, ((CHANNEL, False),)),
    )
}
"""By name, in the order of measuring."""
USUAL_SCHEME = "w4a16"
