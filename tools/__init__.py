# SPDX-License-Identifier: Apache-2.0
"""Scripts behind the Makefile, run as `python3 -m tools.NAME`; nothing of the package itself.

This file is read before any of them, so it stays readable for old Pythons and can turn them away.
"""

import sys

OLDEST_PYTHON = (3, 11)

if sys.version_info < OLDEST_PYTHON:
    sys.exit(
        "error: Python %d.%d is too old, %d.%d or newer is needed; "  # noqa: UP031 (f-strings need 3.6)
        "name another one: make demo PYTHON=/path/to/python3.12"
        % (sys.version_info[:2] + OLDEST_PYTHON)
    )
