# SPDX-License-Identifier: Apache-2.0
"""Hides AMX from torch, and so from upstream's and our choice of kernels, in every process that has
this folder on PYTHONPATH: on a processor that has it the tests would see other kernels than on the
processors that ours are for.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

FUNCTIONS = ("_is_amx_tile_supported", "_is_amx_fp16_supported")


def hide(torch_cpu: ModuleType) -> None:
    """Makes torch.cpu say that there is no AMX."""
    for name in FUNCTIONS:
        setattr(torch_cpu, name, lambda: False)


class WithTorch(importlib.abc.MetaPathFinder):
    """Hides it when torch.cpu is imported, and only then: most processes want no torch."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Where torch.cpu is, with a loader that hides AMX after loading it."""
        if name != "torch.cpu":
            return None
        sys.meta_path.remove(self)
        found = importlib.machinery.PathFinder.find_spec(name, path)
        if found is not None and found.loader is not None:
            execute = found.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                hide(module)

            found.loader.exec_module = exec_module  # type: ignore[method-assign]
        return found


def _run_the_next() -> None:
    """Python runs one sitecustomize: that of the environment must not be lost by this one."""
    here = Path(__file__).resolve().parent
    others = [entry for entry in sys.path if Path(entry).resolve() != here]
    found = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if found is not None and found.loader is not None:
        found.loader.exec_module(importlib.util.module_from_spec(found))


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, WithTorch())
    _run_the_next()
