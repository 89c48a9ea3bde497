# SPDX-License-Identifier: Apache-2.0
"""A virtual environment for a peer: its package on top of what this interpreter already has.

The peer's own packages come first on the path; torch and vLLM are borrowed from the environment
that runs the script, which stays as it is.
"""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path


class PeerError(RuntimeError):
    """The peer cannot be had here; the message says what was tried and what pip answered."""


def make(directory: Path, requirements: list[str], module: str, *, dependencies: bool) -> Path:
    """Makes or reuses the environment.

    Args:
        directory: where it lies; made if missing, made anew if the module is not in it.
        requirements: what pip installs into it, by pip's own configuration.
        module: what can then be imported; an environment where it can is reused.
        dependencies: whether pip also installs what the requirements require.

    Returns:
        Its Python.

    Raises:
        PeerError: pip failed, or the module cannot be imported afterwards.
    """
    python = directory / "bin" / "python"
    if not _imports(python, module):
        venv.create(directory, with_pip=True, clear=directory.exists())
        extra = [] if dependencies else ["--no-deps"]
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*pip, *extra, *requirements], capture_output=True, text=True)
        if done.returncode:
            raise PeerError(f"pip cannot install {' '.join(requirements)}:\n{done.stderr.strip()}")
        _borrow(python)
    if not _imports(python, module):
        answer = subprocess.run(
            [str(python), "-c", f"import {module}"], capture_output=True, text=True
        )
        raise PeerError(f"{module} was installed but cannot be imported:\n{answer.stderr.strip()}")
    return python


def _borrow(python: Path) -> None:
    """Appends this interpreter's packages, and this source tree, to the environment's path."""
    answer = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    ours = sysconfig.get_path("purelib")
    tree = Path(__file__).resolve().parent.parent
    # An editable install finds its package through its own .pth file, so that one is named too.
    lines = [ours, f"import site; site.addsitedir({ours!r})", str(tree)]
    Path(answer.stdout.strip(), "borrowed.pth").write_text("\n".join(lines) + "\n")


def _imports(python: Path, module: str) -> bool:
    if not python.exists():
        return False
    return (
        subprocess.run([str(python), "-c", f"import {module}"], capture_output=True).returncode == 0
    )


if __name__ == "__main__":
    sys.exit("peer_venv.py is used by the peer scripts beside it")
