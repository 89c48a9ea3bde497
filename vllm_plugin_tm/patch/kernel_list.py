# SPDX-License-Identifier: Apache-2.0
"""What the patches of kernel lists share: ours stand first in a list of upstream's that stays the
same object, because schemes and choosers hold references to it."""

from collections.abc import Callable
from dataclasses import dataclass

from vllm.platforms import PlatformEnum

from vllm_plugin_tm import machine


def platform() -> PlatformEnum:
    """The key of upstream's tables for the device that this process uses."""
    return PlatformEnum.CUDA if machine.device() == "cuda" else PlatformEnum.CPU


@dataclass(frozen=True)
class KernelList:
    """`live` gives upstream's list; `kernels` are the classes of ours that go first, in order."""

    live: Callable[[], list[type]]
    kernels: tuple[type, ...]

    def install(self) -> None:
        """First in the list is first asked. Does nothing when they are there already."""
        if not self.installed():
            self.remove()
            self.live()[:0] = self.kernels

    def remove(self) -> None:
        """Takes our kernels out of the list wherever they stand."""
        kernels = self.live()
        kernels[:] = [kernel for kernel in kernels if kernel not in self.kernels]

    def installed(self) -> bool:
        """Whether our kernels are the first that the chooser asks."""
        return tuple(self.live()[: len(self.kernels)]) == self.kernels
