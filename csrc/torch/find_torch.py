# SPDX-License-Identifier: Apache-2.0
"""Prints the directory of the torch package that the extension will be built against.

pip builds in an isolated environment that hides the packages of the environment it installs
into, but runs the same interpreter: torch is then found where that interpreter installs packages.
"""

import importlib.util
import sys
import sysconfig
from pathlib import Path


def candidates() -> list[Path]:
    """Directories that may be the torch package, best first."""
    found = []
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        found += [Path(p) for p in spec.submodule_search_locations]
    found += [Path(sysconfig.get_path(name)) / "torch" for name in ("platlib", "purelib")]
    return found


def main() -> int:
    for path in candidates():
        # The stable ABI had no parallel_for before 2.10; its header tells old from new.
        header = path / "include" / "torch" / "csrc" / "stable" / "ops.h"
        if header.is_file() and "parallel_for" in header.read_text(encoding="utf-8"):
            print(path)
            return 0
    print(f"no torch with stable ABI headers in {[str(p) for p in candidates()]}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
