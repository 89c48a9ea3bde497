# SPDX-License-Identifier: Apache-2.0
"""What glibc's allocator does with freed memory. On other C libraries both functions do nothing."""

import contextlib
import ctypes
from collections.abc import Iterator

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_USUAL = 32 << 20
"""The most that glibc raises its threshold to by itself; a process with tensors soon meets it."""


def keep(size: int) -> None:
    """From now on freed blocks up to `size` bytes stay with the process for the next ones, whose
    pages need not be mapped again."""
    _set_thresholds(size, size)


@contextlib.contextmanager
def reusing(size: int = 256 << 20) -> Iterator[None]:
    """Around work that allocates much, of the same sizes again and again: pages are mapped once.
    What is free at the end goes back to the system."""
    keep(size)
    try:
        yield
    finally:
        _set_thresholds(2 * _USUAL, _USUAL)
        trim()


def _set_thresholds(to_trim: int, to_map: int) -> None:
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(_TRIM_THRESHOLD, to_trim)
        library.mallopt(_MMAP_THRESHOLD, to_map)


def trim() -> None:
    """Gives whole free pages back to the system, also those between blocks in use."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
