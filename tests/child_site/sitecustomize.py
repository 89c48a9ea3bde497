# SPDX-License-Identifier: Apache-2.0
"""What the tests' children see differently, in every process that has this folder on PYTHONPATH;
nothing is changed on disk.

AMX is hidden from torch, and so from upstream's choice of kernels: what upstream runs and refuses
without us is then the same on every machine. Our kernels ask the processor, and are tested on its
AMX.

A torchvision that was built for another torch can be imported. Such a build cannot load its library
of operators, and then dies describing operators that nobody declared. They are declared here,
without implementation: text models call none of them, and one that did would be told so by torch. A
build that fits declares its own, and is left alone.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

AMX = ("_is_amx_tile_supported", "_is_amx_fp16_supported")
"""The functions of torch.cpu that tell."""

DESCRIBED = ("nms", "qnms")
"""What torchvision describes at import, all of one signature."""
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

_kept: list[Any] = []  # declarations end with the object that made them


class BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing: acts when torchvision is about to be looked for, and only then, since most
    processes that Python starts want no torch."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Declares the operators where torchvision cannot."""
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        found = importlib.machinery.PathFinder.find_spec(name)
        if found is not None and found.origin is not None:
            _declare(Path(found.origin).parent)


def _declare(package: Path) -> None:
    import torch

    for library in package.glob("_C*.so"):
        try:
            torch.ops.load_library(library)
        except OSError:
            continue
        return
    declarations = torch.library.Library("torchvision", "DEF")
    for name in DESCRIBED:
        declarations.define(f"{name}{SIGNATURE}")
    _kept.append(declarations)


def hide_amx(torch_cpu: ModuleType) -> None:
    """Makes torch.cpu say that there is no AMX."""
    for name in AMX:
        setattr(torch_cpu, name, lambda: False)


class WithTorch(importlib.abc.MetaPathFinder):
    """Hides AMX when torch.cpu is imported, and only then."""

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
                hide_amx(module)

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
    sys.meta_path[:0] = [BeforeTorchvision(), WithTorch()]
    _run_the_next()
