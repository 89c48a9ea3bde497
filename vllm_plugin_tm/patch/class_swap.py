# SPDX-License-Identifier: Apache-2.0
"""What the patches of classes share: a subclass of upstream's live class, with ours mixed in before
it, under the same name in the module that upstream looks it up in."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class ClassSwap:
    """`module` and `name` are where upstream looks the class up, `mixin` what goes before it. A
    name with a dot is that of an attribute of a class."""

    module: str
    name: str
    mixin: type

    def install(self) -> None:
        """Upstream's class becomes a subclass of it. Does nothing where it is one already."""
        if not self.installed():
            # Some code compares the name of a class.
            live = self.live()
            ours = type(live.__name__, (self.mixin, live), {"__module__": __name__})
            self._put(ours)

    def remove(self) -> None:
        """Puts upstream's class back."""
        if self.installed():
            self._put(self.live().__bases__[-1])

    def installed(self) -> bool:
        """Whether upstream would find ours."""
        return issubclass(self.live(), self.mixin)

    def live(self) -> type:
        """What upstream finds now."""
        owner, name = self._place()
        found: type = getattr(owner, name)
        return found

    def _put(self, kind: type) -> None:
        setattr(*self._place(), kind)

    def _place(self) -> tuple[Any, str]:
        *owners, name = self.name.split(".")
        return reduce(getattr, owners, import_module(self.module)), name


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
