# SPDX-License-Identifier: Apache-2.0
"""Lets a torchvision that was built for another torch be imported, in every process that has this
folder on PYTHONPATH; nothing is changed on disk.

Such a build cannot load its library of operators, and then dies describing operators that nobody
declared. They are declared here, without implementation: text models call none of them, and one
that did would be told so by torch. A build that fits declares its own, and is left alone.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import Any

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


def _run_the_next() -> None:
    """Python runs one sitecustomize: that of the environment must not be lost by this one."""
    here = Path(__file__).resolve().parent
    others = [entry for entry in sys.path if Path(entry).resolve() != here]
    found = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if found is not None and found.loader is not None:
        found.loader.exec_module(importlib.util.module_from_spec(found))


sys.meta_path.insert(0, BeforeTorchvision())
_run_the_next()
