# SPDX-License-Identifier: Apache-2.0
"""`vllm-tm inspect`: a table of a checkpoint's matrices; quantization/convert finds them."""

import argparse
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from vllm_plugin_tm.quantization.convert import ConvertError

if TYPE_CHECKING:
    from vllm_plugin_tm.quantization.convert.inspection import Inspected

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `vllm-tm inspect`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="a checkpoint")
    parser.add_argument(
        "--source", type=Path, metavar="SRC", help="what it was made of: weights are compared"
    )
    parser.add_argument("--json", action="store_true", help="print every module, as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints the table: 0, or 1 where the checkpoint cannot be read."""
    errors = Console(stderr=True, soft_wrap=True)
    try:
        from vllm_plugin_tm import machine
        from vllm_plugin_tm.quantization.convert.inspection import inspect

        found = list(inspect(args.folder, machine.detect(), args.source))
    except ConvertError as error:
        errors.print(f"vllm-tm inspect: {error}", highlight=False, markup=False)
        return 1
    if args.json:
        print(json.dumps([asdict(module) for module in found], indent=2))
    else:
        wide = Console(width=None if Console().is_terminal else 200)
        wide.print(table(found))
        for why in dict.fromkeys(module.why for module in found if module.why):
            wide.print(f"upstream: {why}", highlight=False, markup=False)
    return 0


@dataclass
class _Row:
    """Modules that differ in the numbers in their names only."""

    modules: list["Inspected"] = field(default_factory=list)


def table(found: Iterable["Inspected"]) -> Table:
    """A row for modules that are alike: name but for its numbers, scheme, shape, kernel."""
    rows: dict[tuple, _Row] = {}
    for module in found:
        name = _NUMBER.sub("*", module.module)
        key = (name, module.scheme, module.shape, module.kernel)
        rows.setdefault(key, _Row()).modules.append(module)
    compared = any(module.error for row in rows.values() for module in row.modules)
    result = Table(box=None, pad_edge=False)
    for title in ("modules", "name", "scheme", "N x K", "MB", "runs on"):
        result.add_column(title, justify="right" if title in ("modules", "MB") else "left")
    if compared:
        result.add_column("error (norm)", justify="right")
        result.add_column("largest", justify="right")
    for (name, scheme, shape, kernel), row in rows.items():
        cells = [
            str(len(row.modules)),
            name,
            scheme,
            f"{shape[0]} x {shape[1]}",
            f"{sum(module.nbytes for module in row.modules) / 1e6:,.1f}",
            kernel,
        ]
        if compared:
            cells += _errors(row.modules)
        result.add_row(*cells)
    return result


def _errors(modules: list["Inspected"]) -> list[str]:
    """The largest errors of a row's modules."""
    errors = [module.error for module in modules if module.error]
    if not errors:
        return ["", ""]
    relative = max(error.relative for error in errors)
    return [f"{relative:.2%}", f"{max(error.largest for error in errors):.3g}"]
