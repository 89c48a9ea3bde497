# SPDX-License-Identifier: Apache-2.0
"""What glibc's allocator does with freed memory. On other C libraries both functions do nothing."""

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h


def keep(size: int) -> None:
    """From now on freed blocks up to `size` bytes stay with the process for the next ones, whose
    pages need not be mapped again."""
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(_TRIM_THRESHOLD, size)
        library.mallopt(_MMAP_THRESHOLD, size)


def trim() -> None:
    """Gives whole free pages back to the system, also those between blocks in use."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
