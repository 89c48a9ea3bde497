# SPDX-License-Identifier: Apache-2.0
"""What stands between the two products of an expert, as the ops take it: see csrc/cpu/moe.h."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Activation:
    """The ops take the fields by their names; what a name means of them, reference_moe says."""

    name: str = "swiglu"
    alpha: float = 1.0
    beta: float = 0.0
    limit: float = math.inf

    @property
    def gated(self) -> bool:
        """Whether the first product has two halves, gates and ups."""
        return not self.name.endswith("_no_mul")
