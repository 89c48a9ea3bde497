# SPDX-License-Identifier: Apache-2.0
"""What the tests' children see differently, in every process that has this folder on PYTHONPATH;
nothing is changed on disk.

AMX is hidden from torch, and so from vLLM's choice of kernels: what vLLM runs and refuses without
the plugin is then the same on every machine. The plugin's kernels ask the processor, and are tested
on its AMX. lesser_processor.py hides more, from the plugin too, where its variable asks for it.

A torchvision that was built for another torch can be imported. Such a build cannot load its library
of operators, and then dies describing operators that nobody declared. They are declared here,
without implementation: text models call none of them, and one that did would be told so by torch. A
build that fits declares its own, and is left alone.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from lesser_processor import (
    Processor,
    hide,
    is_amx,
    limit_plugin,
    limit_products,
    limit_torch,
    named,
)

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


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module right after its import, and only then: most processes that
    Python starts want no torch."""

    def __init__(self, functions: dict[str, Callable[[ModuleType], None]]) -> None:
        self._functions = functions

    @classmethod
    def install(cls, functions: dict[str, Callable[[ModuleType], None]]) -> None:
        """From now on; for what is imported already, at once."""
        for name in sys.modules.keys() & functions.keys():
            functions.pop(name)(sys.modules[name])
        sys.meta_path.insert(0, cls(functions))

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Where the module is, with a loader that calls the function after loading it. Some ask for
        torch's place without importing it."""
        function = self._functions.pop(name, None)
        if function is None:
            return None
        found = importlib.util.find_spec(name)  # by all other finders
        self._functions[name] = function
        if found is not None and found.loader is not None:
            execute = found.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                del self._functions[name]
                execute(module)
                function(module)

            found.loader.exec_module = exec_module  # type: ignore[method-assign]
        return found


def functions(processor: Processor | None) -> dict[str, Callable[[ModuleType], None]]:
    """What is called after the import of which module."""
    if processor is None:
        return {"torch.cpu": lambda module: limit_torch(module, is_amx)}
    return {
        "torch": limit_products,
        "torch.cpu": lambda module: limit_torch(module, processor.hides),
        "vllm_plugin_tm.kernels.ops": lambda module: limit_plugin(module, processor),
    }


def _run_the_next() -> None:
    """Python runs one sitecustomize: that of the environment must not be lost by this one."""
    here = Path(__file__).resolve().parent
    others = [entry for entry in sys.path if Path(entry).resolve() != here]
    found = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if found is not None and found.loader is not None:
        found.loader.exec_module(importlib.util.module_from_spec(found))


if __name__ == "sitecustomize":
    _processor = named(os.environ)
    if _processor is not None:
        hide(_processor)
    sys.meta_path.insert(0, BeforeTorchvision())
    AfterImport.install(functions(_processor))
    _run_the_next()
