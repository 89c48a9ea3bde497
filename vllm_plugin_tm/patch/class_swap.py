# SPDX-License-Identifier: Apache-2.0
"""What the patches of classes share: a subclass of upstream's live class, with ours mixed in before
it, under the same name in the module that upstream looks it up in."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class ClassSwap:
    """`module` and `name` are where upstream looks the class up, `mixin` what goes before it."""

    module: str
    name: str
    mixin: type

    def install(self) -> None:
        """Upstream's class becomes a subclass of it. Does nothing where it is one already."""
        if not self.installed():
            # Some code compares the name of a class.
            ours = type(self.name, (self.mixin, self.live()), {"__module__": __name__})
            setattr(import_module(self.module), self.name, ours)

    def remove(self) -> None:
        """Puts upstream's class back."""
        if self.installed():
            setattr(import_module(self.module), self.name, self.live().__bases__[-1])

    def installed(self) -> bool:
        """Whether upstream would find ours."""
        return issubclass(self.live(), self.mixin)

    def live(self) -> type:
        """What upstream finds now."""
        found: type = getattr(import_module(self.module), self.name)
        return found


@dataclass(frozen=True)
class ClassSwaps:
    """All of several, as a patch module offers them."""

    swaps: Sequence[ClassSwap]

    def install(self) -> None:
        """Every class that is upstream's own becomes a subclass of it."""
        for swap in self.swaps:
            swap.install()

    def remove(self) -> None:
        """Puts upstream's classes back."""
        for swap in reversed(self.swaps):
            swap.remove()

    def installed(self) -> bool:
        """Whether all classes are ours."""
        return all(swap.installed() for swap in self.swaps)
