# SPDX-License-Identifier: Apache-2.0
"""`make clean`: removes what the other targets made, and nothing that git tracks."""

import shutil

from tools import layout
from tools.console import run_main, say

MADE = (".venv", "build", "dist", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis")


def main() -> int:
    """`python3 -m tools.clean`"""
    for name in MADE:
        path = layout.ROOT / name
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            shutil.rmtree(path)
        else:
            continue
        say(f"removed {name}")
    return 0


if __name__ == "__main__":
    run_main(main)
