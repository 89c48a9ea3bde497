# SPDX-License-Identifier: Apache-2.0
"""`make compat`: holds the patch table against the sources of every vLLM version it claims.

Prints a matrix of symbols by versions and, below it, each signature that is not the table's first.
The sources come from the package index, are kept in build/compat and are parsed, never imported.
"""

import argparse
import ast
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tools import package_index
from tools.layout import BUILD, ROOT
from tools.python_source import SourceTree
from vllm_plugin_tm.patch.table import accepts, all_expectations
from vllm_plugin_tm.versions import TESTED_VLLM

CACHE = BUILD / "compat"
MISSING = "nothing"
PRESENT = "present"


@dataclass(frozen=True)
class Cell:
    """One symbol in one version: what the table accepts and what the source shows; `hint` names
    the modules that declare something of its name, for a symbol that is not where it was."""

    symbol: str
    version: str
    expected: str
    found: str
    hint: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """ok | moved (the symbol is not there) | differs (it is there with another signature)."""
        if self.found == MISSING:
            return "moved"
        ok = self.expected == PRESENT or accepts(self.expected, self.found)
        return "ok" if ok else "differs"


def sources(version: str, say: Callable[[str], None] = print) -> SourceTree:
    """vLLM's Python files of one version, fetched at the first call.

    Raises package_index.FetchError.
    """
    folder = CACHE / version
    if not (folder / "vllm" / "__init__.py").is_file():
        archive = package_index.fetch_sdist("vllm", version, CACHE / "sdist", say=say)
        package_index.extract(
            archive, folder, lambda path: path.startswith("vllm/") and path.endswith(".py")
        )
    return SourceTree(folder)


def imported_symbols(package: Path) -> tuple[str, ...]:
    """Every upstream name that a package's files import, wherever the statement stands, as
    "module:name"; a whole module as "module"."""
    found = set()
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and _upstream(node.module or ""):
                found |= {f"{node.module}:{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names if _upstream(alias.name)}
    return tuple(sorted(found))


def expectations() -> dict[str, str]:
    """What must hold in every version: the patch table's expectations, and the presence of every
    upstream name that the package imports."""
    wanted = dict.fromkeys(imported_symbols(ROOT / "vllm_plugin_tm"), PRESENT)
    return wanted | all_expectations()


def inspect_tree(tree: SourceTree, version: str, wanted: Mapping[str, str]) -> list[Cell]:
    """One cell per symbol, in the order of `wanted`."""
    return [_cell(tree, version, symbol, expected) for symbol, expected in wanted.items()]


def matrix(cells: Iterable[Cell]) -> str:
    """A table of symbols by versions, then a line for each cell that is not plainly "ok": every
    accepted older form, and expected and found where the contract is broken."""
    grid: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        grid.setdefault(cell.symbol, {})[cell.version] = cell
    versions = list(dict.fromkeys(version for row in grid.values() for version in row))
    width = max(map(len, grid))
    lines = [f"{'':{width}}  " + "  ".join(f"{version:>8}" for version in versions)]
    notes = []
    for symbol, row in grid.items():
        lines.append(
            f"{symbol:{width}}  " + "  ".join(f"{_mark(row[version]):>8}" for version in versions)
        )
        notes += [_note(row[version]) for version in versions if _mark(row[version]) != "ok"]
    return "\n".join([*lines, "", *notes])


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0: every version satisfies every expectation; 1: one does not; 2: the sources
    could not be had."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=list(TESTED_VLLM), help="vLLM releases")
    versions = parser.parse_args(arguments).versions
    wanted = expectations()
    cells: list[Cell] = []
    for version in versions:
        try:
            cells += inspect_tree(sources(version), version, wanted)
        except package_index.FetchError as error:
            print(f"compat: the sources of vLLM {version} cannot be had: {error}", file=sys.stderr)
            return 2
    print(matrix(cells))
    broken = [cell for cell in cells if cell.verdict != "ok"]
    print(f"{len(wanted)} symbols, {len(versions)} versions: {len(broken)} broken")
    return 1 if broken else 0


def _upstream(module: str) -> bool:
    return module == "vllm" or module.startswith("vllm.")


def _cell(tree: SourceTree, version: str, symbol: str, expected: str) -> Cell:
    try:
        tree.find(symbol)
    except LookupError:
        name = symbol.rpartition(":")[2].partition(".")[0]
        return Cell(symbol, version, expected, MISSING, tree.declaring(name))
    if expected == PRESENT:
        return Cell(symbol, version, expected, PRESENT)
    try:
        return Cell(symbol, version, expected, tree.describe(symbol))
    except LookupError as error:
        return Cell(symbol, version, expected, f"unclear ({error})")


def _mark(cell: Cell) -> str:
    """The verdict, with "older" for an accepted form that is not the first one of the table."""
    if cell.verdict == "ok" and cell.expected != PRESENT:
        return "ok" if cell.expected.split(" | ")[0] == cell.found else "older"
    return cell.verdict


def _note(cell: Cell) -> str:
    if cell.verdict == "ok":
        return f"{cell.version} {cell.symbol}: the accepted form {cell.found}"
    hint = f" (the name is declared in {', '.join(cell.hint)})" if cell.hint else ""
    return f"{cell.version} {cell.symbol}: expected {cell.expected}, found {cell.found}{hint}"


if __name__ == "__main__":
    sys.exit(main())
