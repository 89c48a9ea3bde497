# SPDX-License-Identifier: Apache-2.0
"""Reads what a Python package declares from its source files, by `ast`: nothing is imported.

A symbol is written "module:attribute.path". What it is, is told in the notation of the patch
table: for a function the text of `inspect.signature` without annotations, for a class that of
its constructor, for anything else the name of its type.
"""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_BLOCKS = (ast.If, ast.Try, ast.With)
_FACTORY = "<factory>"  # how inspect.signature shows a dataclass field with a default_factory


@dataclass(frozen=True)
class Declaration:
    """Where a symbol is declared: the module that holds it and its syntax node (a function, a
    class, an assigned expression, or the ast.Module of a submodule)."""

    module: str
    node: ast.AST


class SourceTree:
    """The source files of the packages below `root`, the folder that would be on sys.path."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._parse = cache(self._read)

    def module_file(self, module: str) -> Path | None:
        """The file of a dotted module name, None when there is no such module."""
        base = self.root.joinpath(*module.split("."))
        candidates = (base / "__init__.py", base.with_name(base.name + ".py"))
        return next((path for path in candidates if path.is_file()), None)

    def find(self, symbol: str) -> Declaration:
        """The declaration of a symbol, through re-exports and base classes.

        Raises LookupError naming the part of the path that is not there.
        """
        module, _, path = symbol.partition(":")
        found = Declaration(module, self._parse(module))
        for attribute in path.split(".") if path else ():
            found = self._attribute(found, attribute, symbol)
        return found

    def describe(self, symbol: str) -> str:
        """The symbol in the patch table's notation. Raises LookupError when it is missing, or is
        the result of an expression whose type the source does not show."""
        found = self.find(symbol)
        if isinstance(found.node, ast.ClassDef):
            return str(self._constructor(found))
        if isinstance(found.node, ast.FunctionDef | ast.AsyncFunctionDef):
            return _describe_function(found.node)
        if isinstance(found.node, ast.Module):
            return "module"
        return _type_name(found.node, symbol)

    def bases(self, symbol: str) -> tuple[str, ...]:
        """The base classes of a class as its source writes them. Raises LookupError."""
        node = self.find(symbol).node
        if not isinstance(node, ast.ClassDef):
            raise LookupError(f"{symbol} is not a class")
        return tuple(ast.unparse(base) for base in node.bases)

    def entries(self, symbol: str) -> tuple[str, ...]:
        """The keys of a dict literal, or the elements of a list, tuple or set literal, as source
        text. Raises LookupError when the symbol is not such a literal."""
        node = self.find(symbol).node
        if isinstance(node, ast.Dict):
            return tuple("**" if key is None else ast.unparse(key) for key in node.keys)
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            return tuple(ast.unparse(element) for element in node.elts)
        raise LookupError(f"{symbol} is not a literal table")

    def declaring(self, name: str) -> tuple[str, ...]:
        """The modules whose top level defines or assigns the name: where a moved symbol went."""
        found = []
        for path in sorted(self.root.rglob("*.py")):
            if name not in path.read_text(encoding="utf-8"):
                continue
            parts = path.relative_to(self.root).with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if any(
                _bound(node, name) is not None for node in _statements(self._parse(module).body)
            ):
                found.append(module)
        return tuple(found)

    def _read(self, module: str) -> ast.Module:
        path = self.module_file(module)
        if path is None:
            raise LookupError(f"no module {module}")
        return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))

    def _attribute(self, owner: Declaration, name: str, symbol: str) -> Declaration:
        found: Declaration | None = None
        if isinstance(owner.node, ast.Module):
            found = self._in_module(owner.module, name, frozenset())
        elif isinstance(owner.node, ast.ClassDef):
            found = next(
                (
                    self._value(Declaration(holder.module, node))
                    for holder in self._classes(owner)
                    for node in [self._assigned(holder, name) or _declared(holder.node, name)]
                    if node is not None
                ),
                None,
            )
        if found is None:
            raise LookupError(f"{symbol}: no {name!r}")
        return found

    def _assigned(self, owner: Declaration, name: str) -> ast.AST | None:
        """What a statement of the class's module, after the class, assigns to its attribute."""
        assert isinstance(owner.node, ast.ClassDef)
        target = f"{owner.node.name}.{name}"
        values = [
            node.value
            for node in _statements(self._parse(owner.module).body)
            if isinstance(node, ast.Assign) and target in map(ast.unparse, node.targets)
        ]
        return values[-1] if values else None

    def _value(self, found: Declaration) -> Declaration:
        """What a name stands for, where the declaration is one that its module knows."""
        if isinstance(found.node, ast.Name):
            return self._in_module(found.module, found.node.id, frozenset()) or found
        return found

    def _in_module(self, module: str, name: str, seen: frozenset[str]) -> Declaration | None:
        """Looks a name up in a module's namespace; the last statement that binds it counts."""
        if f"{module}:{name}" in seen:
            return None
        seen |= {f"{module}:{name}"}
        for node in reversed(list(_statements(self._parse(module).body))):
            if isinstance(node, ast.ImportFrom):
                found = self._imported(module, node, name, seen)
                if found is not None:
                    return found
            elif (value := _bound(node, name)) is not None:
                if isinstance(value, ast.Name):  # an alias: Old = New
                    return self._in_module(module, value.id, seen) or Declaration(module, value)
                return Declaration(module, value)
        if self.module_file(f"{module}.{name}"):
            return Declaration(f"{module}.{name}", self._parse(f"{module}.{name}"))
        return self._served(module, name)

    def _served(self, module: str, name: str) -> Declaration | None:
        """A name that the module's __getattr__ answers for: the comparison that names it there."""
        for node in _statements(self._parse(module).body):
            if isinstance(node, ast.FunctionDef) and node.name == "__getattr__":
                for part in ast.walk(node):
                    if isinstance(part, ast.Compare) and repr(name) in ast.unparse(part):
                        return Declaration(module, part)
        return None

    def _imported(
        self, module: str, node: ast.ImportFrom, name: str, seen: frozenset[str]
    ) -> Declaration | None:
        for alias in node.names:
            if alias.name != "*" and (alias.asname or alias.name) != name:
                continue
            source = self._absolute(module, node)
            if self.module_file(source) is None:
                continue
            wanted = name if alias.name == "*" else alias.name
            found = self._in_module(source, wanted, seen)
            if found is not None:
                return found
        return None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        path = self.module_file(module)
        package = module.split(".")
        if path is not None and path.name != "__init__.py":
            package = package[:-1]
        package = package[: len(package) - node.level + 1]
        return ".".join([*package, *([node.module] if node.module else [])])

    def _classes(self, start: Declaration) -> Iterator[Declaration]:
        """The class and its bases inside this tree, depth first: the method resolution order of
        single inheritance, which is all that upstream uses where we look."""
        yield start
        assert isinstance(start.node, ast.ClassDef)
        for base in start.node.bases:
            plain = base.value if isinstance(base, ast.Subscript) else base
            if not isinstance(plain, ast.Name):
                continue
            found = self._in_module(start.module, plain.id, frozenset())
            if found is not None and isinstance(found.node, ast.ClassDef):
                yield from self._classes(found)

    def _constructor(self, found: Declaration) -> inspect.Signature:
        classes = list(self._classes(found))
        for holder in classes:
            if (init := _declared(holder.node, "__init__")) is not None:
                assert isinstance(init, ast.FunctionDef | ast.AsyncFunctionDef)
                parameters = list(signature(init).parameters.values())
                return inspect.Signature(parameters[1:])
            if _is_dataclass(holder.node):
                return _dataclass_signature([c.node for c in classes if _is_dataclass(c.node)])
        return inspect.Signature()


class _Shown:
    """A default value, shown as the source text that it stands for."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> inspect.Signature:
    """A function's signature without annotations. Defaults that are literals are shown by their
    repr, others by their source text; decorators are taken to keep the signature, as
    functools.wraps does."""
    kinds = inspect.Parameter
    args = node.args
    parameters: list[inspect.Parameter] = []
    plain = [(a, kinds.POSITIONAL_ONLY) for a in args.posonlyargs]
    plain += [(a, kinds.POSITIONAL_OR_KEYWORD) for a in args.args]
    missing: list[ast.expr | None] = [None] * (len(plain) - len(args.defaults))
    for (argument, kind), default in zip(plain, missing + args.defaults, strict=True):
        parameters.append(_parameter(argument.arg, kind, default))
    if args.vararg:
        parameters.append(_parameter(args.vararg.arg, kinds.VAR_POSITIONAL, None))
    for argument, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        parameters.append(_parameter(argument.arg, kinds.KEYWORD_ONLY, default))
    if args.kwarg:
        parameters.append(_parameter(args.kwarg.arg, kinds.VAR_KEYWORD, None))
    return inspect.Signature(parameters)


def _parameter(
    name: str, kind: inspect._ParameterKind, default: ast.expr | None
) -> inspect.Parameter:
    shown = inspect.Parameter.empty if default is None else _Shown(_value_text(default))
    return inspect.Parameter(name, kind, default=shown)


def _value_text(node: ast.expr) -> str:
    try:
        return repr(ast.literal_eval(node))
    except ValueError:
        return ast.unparse(node)


def _describe_function(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    if "property" in decorators:
        return "property"
    found = signature(node)
    if "classmethod" in decorators:
        found = inspect.Signature(list(found.parameters.values())[1:])
    return str(found)


def _type_name(node: ast.AST, symbol: str) -> str:
    displays = {ast.Dict: "dict", ast.DictComp: "dict", ast.List: "list", ast.ListComp: "list"}
    displays |= {ast.Tuple: "tuple", ast.Set: "set", ast.SetComp: "set"}
    if type(node) in displays:
        return displays[type(node)]
    if isinstance(node, ast.Constant):
        return type(node.value).__name__
    raise LookupError(f"{symbol}: its source, {ast.unparse(node)}, does not show its type")


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module or class body runs, branches flattened."""
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from _statements(node.orelse)
        elif isinstance(node, _BLOCKS):
            # A fallback (orelse, handlers) comes first: lookups take the last one that binds.
            for handler in getattr(node, "handlers", ()):
                yield from _statements(handler.body)
            yield from _statements(getattr(node, "orelse", []))
            yield from _statements(node.body)
            yield from _statements(getattr(node, "finalbody", []))
        else:
            yield node


def _bound(node: ast.stmt, name: str) -> ast.AST | None:
    """What the statement binds the name to; an annotation without a value binds nothing."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return node if node.name == name else None
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    elif isinstance(node, ast.Assign):
        targets = node.targets
    else:
        return None
    return node.value if any(isinstance(t, ast.Name) and t.id == name for t in targets) else None


def _declared(owner: ast.AST, name: str) -> ast.AST | None:
    assert isinstance(owner, ast.ClassDef)
    values = [_bound(node, name) for node in _statements(owner.body)]
    return next((value for value in reversed(values) if value is not None), None)


def _dataclass_call(node: ast.AST) -> ast.expr | None:
    assert isinstance(node, ast.ClassDef)
    for decorator in node.decorator_list:
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        if ast.unparse(called) in ("dataclass", "dataclasses.dataclass"):
            return decorator
    return None


def _is_dataclass(node: ast.AST) -> bool:
    return _dataclass_call(node) is not None


def _keyword(call: ast.expr | None, name: str) -> ast.expr | None:
    if not isinstance(call, ast.Call):
        return None
    return next((k.value for k in call.keywords if k.arg == name), None)


def _flag(call: ast.expr | None, name: str) -> bool | None:
    value = _keyword(call, name)
    return bool(value.value) if isinstance(value, ast.Constant) else None


def _dataclass_signature(classes: list[ast.AST]) -> inspect.Signature:
    """The generated constructor of a dataclass; `classes` are it and its dataclass bases, the
    class itself first."""
    fields: dict[str, inspect.Parameter] = {}
    for owner in reversed(classes):
        assert isinstance(owner, ast.ClassDef)
        all_keyword_only = bool(_flag(_dataclass_call(owner), "kw_only"))
        for node in owner.body:
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            if "ClassVar" in ast.unparse(node.annotation) or _flag(node.value, "init") is False:
                continue
            own = _flag(node.value, "kw_only")
            keyword_only = all_keyword_only if own is None else own
            fields[node.target.id] = _field(node, keyword_only)
    # As the generated __init__ does: keyword-only fields after all others.
    ordered = sorted(fields.values(), key=lambda p: p.kind is inspect.Parameter.KEYWORD_ONLY)
    return inspect.Signature(ordered)


def _field(node: ast.AnnAssign, keyword_only: bool) -> inspect.Parameter:
    assert isinstance(node.target, ast.Name)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    if keyword_only:
        kind = inspect.Parameter.KEYWORD_ONLY
    is_field = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in (
        "field",
        "dataclasses.field",
    )
    if is_field and _keyword(node.value, "default_factory") is not None:
        return inspect.Parameter(node.target.id, kind, default=_Shown(_FACTORY))
    default = _keyword(node.value, "default") if is_field else node.value
    return _parameter(node.target.id, kind, default)
