# SPDX-License-Identifier: Apache-2.0
"""Plans of launches for tests: few or many slices, apart or through, on any tile."""

from c_structs import Layout, Plan

TILES = 11
# The tiles of a device without wgmma and of one with it, fewest rows first.
FAMILIES = {"mma": range(5), "wgmma": range(5, TILES)}
# Slices of K, and whether each has blocks of its own.
SLICES = ((1, False), (2, True), (2, False), (3, True), (5, True), (5, False))


def plan_of(
    layout: Layout, tile: int, slices: int, apart: bool, whole_groups: bool = False
) -> Plan:
    """At most `slices` slices, as the backend would cut them: none is empty, and with whole_groups
    a slice ends where a group does."""
    slabs = -(-layout.k // 64)
    length = -(-slabs // min(slices, slabs))
    group = layout.k // layout.groups // 64
    if whole_groups and layout.groups > 1 and group > 0:
        length = -(-length // group) * group
    count = -(-slabs // length)
    return Plan(tile, count, length, apart and count > 1)
