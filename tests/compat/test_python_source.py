# SPDX-License-Identifier: Apache-2.0
"""The ast reader against inspect.signature on modules written for it, and against moved symbols."""

import importlib
import inspect
import textwrap

import pytest

from tools.python_source import SourceTree

FILES = {
    "pkg/__init__.py": """
        from typing import TYPE_CHECKING
        from .shapes import Config, Late, Middle as Renamed
        from pkg.functions import *
        if TYPE_CHECKING:
            from pkg.nowhere import Config
        def __getattr__(name):
            if name == "lazy":
                return 1
            raise AttributeError(name)
    """,
    "pkg/functions.py": """
        import functools
        TABLE: dict[str, list] = {"a": [], "b": []}
        NAMES = ["x", "y"]
        LIMIT = 3
        COMPUTED = max(1, 2)
        def plain(a, b: int = 3, *args: str, c: "X", d=None, **rest) -> int: ...
        def only(a, /, b, *, c="text", d=(1, 2)): ...
        async def waiting(x=-1.5, y=[]): ...
        try:
            import json
            def chosen(fast): ...
        except ImportError:
            def chosen(slow): ...
        old = plain
    """,
    "pkg/shapes.py": """
        import dataclasses
        from dataclasses import dataclass, field
        from typing import ClassVar, Generic, TypeVar
        T = TypeVar("T")
        @dataclass(frozen=True)
        class Config:
            n: int
            k: int = 4
            kind: ClassVar[str] = "none"
            parts: list = field(default_factory=list)
            hidden: int = field(default=1, init=False)
        @dataclasses.dataclass(frozen=True)
        class Wider(Config):
            k: int = 5
            bias: bool = dataclasses.field(default=False, kw_only=True)
            out: int = 0
        class Base(Generic[T]):
            def __init__(self, name, size=1): ...
            def apply(self, x, bias=None): ...
            @classmethod
            def build(cls, value): ...
            @staticmethod
            def check(value, limit=2): ...
            @property
            def size(self): ...
        class Middle(Base[int]):
            pass
        class Late(Middle):
            def apply(self, x): ...
        class Bare:
            pass
        class Chosen:
            kind: type = Base
            def apply(self): ...
        Chosen.kind = Bare
        class Other(Chosen):
            pass
        Other.kind = Config
    """,
}
SAME_AS_INSPECT = [
    *("pkg:plain", "pkg:only", "pkg.functions:waiting", "pkg.functions:chosen", "pkg:old"),
    *("pkg:Config", "pkg.shapes:Wider", "pkg:Renamed", "pkg:Late", "pkg.shapes:Bare"),
    *("pkg:Late.apply", "pkg:Late.__init__", "pkg:Renamed.apply"),
    *("pkg:Late.build", "pkg:Late.check"),
    *("pkg.shapes:Chosen.kind", "pkg.shapes:Other.kind"),
]


@pytest.fixture
def tree(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return SourceTree(tmp_path)


@pytest.fixture
def package(tree, monkeypatch):
    monkeypatch.syspath_prepend(str(tree.root))
    yield importlib.import_module("pkg")
    for name in [name for name in importlib.sys.modules if name.split(".")[0] == "pkg"]:
        del importlib.sys.modules[name]


@pytest.mark.parametrize("symbol", SAME_AS_INSPECT)
def test_signature_is_that_of_inspect(symbol, tree, package):
    module, _, path = symbol.partition(":")
    value = importlib.import_module(module)
    for attribute in path.split("."):
        value = getattr(value, attribute)
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(value).parameters.values()
    ]
    assert tree.describe(symbol) == str(inspect.Signature(bare))


@pytest.mark.parametrize(
    ("symbol", "kind"),
    [
        ("pkg:TABLE", "dict"),
        ("pkg.functions:NAMES", "list"),
        ("pkg.functions:LIMIT", "int"),
        ("pkg:Late.size", "property"),
        ("pkg:shapes", "module"),
    ],
)
def test_what_is_not_called_is_told_by_its_type(symbol, kind, tree):
    assert tree.describe(symbol) == kind


def test_tables_and_bases(tree):
    assert tree.entries("pkg:TABLE") == ("'a'", "'b'")
    assert tree.entries("pkg:NAMES") == ("'x'", "'y'")
    assert tree.bases("pkg:Late") == ("Middle",)
    with pytest.raises(LookupError, match="not a literal table"):
        tree.entries("pkg:plain")
    with pytest.raises(LookupError, match="not a class"):
        tree.bases("pkg:plain")


def test_a_name_served_by_module_getattr_is_found_but_not_described(tree):
    assert tree.find("pkg:lazy").module == "pkg"
    with pytest.raises(LookupError, match="does not show its type"):
        tree.describe("pkg:lazy")
    with pytest.raises(LookupError, match="does not show its type"):
        tree.describe("pkg.functions:COMPUTED")


@pytest.mark.parametrize(
    ("symbol", "message"),
    [
        ("pkg:gone", "no 'gone'"),
        ("pkg:Late.gone", "no 'gone'"),
        ("pkg.gone:x", "no module pkg.gone"),
        ("other:x", "no module other"),
    ],
)
def test_a_missing_symbol_is_named(symbol, message, tree):
    with pytest.raises(LookupError, match=message):
        tree.find(symbol)


def test_an_import_circle_ends(tree):
    (tree.root / "pkg" / "one.py").write_text("from pkg.two import x\n")
    (tree.root / "pkg" / "two.py").write_text("from pkg.one import x\n")
    with pytest.raises(LookupError, match="no 'x'"):
        tree.find("pkg.one:x")


def test_a_moved_symbol_is_reported_with_its_new_home(tree):
    compat = pytest.importorskip("tools.compat", reason="needs pypi-simple")
    wanted = {
        "pkg.functions:Config": "(n, k=4)",
        "pkg:plain": "(a)",
        "pkg:only": str(tree.describe("pkg:only")),
        "pkg.functions:COMPUTED": "dict",
        "pkg:lazy": compat.PRESENT,
    }
    cells = compat.inspect_tree(tree, "9.9", wanted)
    assert [cell.verdict for cell in cells] == ["moved", "differs", "ok", "differs", "ok"]
    assert cells[0].hint == ("pkg.shapes",)
    text = compat.matrix(cells)
    assert "expected (n, k=4), found nothing (the name is declared in pkg.shapes)" in text
    assert "expected (a), found (a, b=3, *args, c, d=None, **rest)" in text
