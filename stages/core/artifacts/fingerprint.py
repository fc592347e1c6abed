"""A digest of what a stage's code does, which comments, docstrings and layout leave alone.

A file that lies beside a module and is named in it, as a template, is part of the code. The room
`stages.core.execution` is not: it says how a stage runs. The digest is the same under every Python that
the project runs on. This module needs the standard library only.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
EXECUTION = "stages.core.execution"
"""The room of modules that no result depends on."""


@cache
def code_version(module: str) -> str:
    """Digest of the module and of all of the project's modules that it imports, directly or not.

    Modules of `EXECUTION` do not count.
    """
    combined = hashlib.sha256()
    for name in sorted(_closure(module)):
        combined.update(f"{name}:{_module_digest(name)}\n".encode())
    return combined.hexdigest()[:12]


def _closure(module: str) -> set[str]:
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen or _is_execution(name) or _path(name) is None:
            continue
        seen.add(name)
        waiting.extend(_imports(name))
    return seen


def _is_execution(module: str) -> bool:
    return f"{module}.".startswith(f"{EXECUTION}.")


def _path(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


@cache
def _tree(module: str) -> ast.Module:
    path = _path(module)
    assert path is not None
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _imports(module: str) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
    return frozenset(name for name in names if name.split(".")[0] == "stages")


@cache
def _module_digest(module: str) -> str:
    tree = _tree(module)
    digest = hashlib.sha256(canonical(tree).encode())
    place = _path(module)
    assert place is not None
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    for path in _files_in(place.parent):
        if path.name in texts:
            digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _files_in(folder: Path) -> list[Path]:
    """Files that are no code."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix != ".py")


def canonical(part: object) -> str:
    """A syntax tree as text, without positions and docstrings, the same under every Python.

    `ast.dump` is not: new versions add fields that are empty for old code, and write fewer of those
    that are empty. Here an empty field is left out.
    """
    if isinstance(part, ast.AST):
        fields = (
            f"{name}={canonical(value)}"
            for name, value in _fields(part)
            if value is not None and value != []
        )
        return f"{type(part).__name__}({', '.join(fields)})"
    if isinstance(part, list):
        return f"[{', '.join(map(canonical, part))}]"
    # What `repr` takes for printable depends on the version's Unicode tables.
    return f"{type(part).__name__} {part!a}"


def _fields(node: ast.AST) -> Iterator[tuple[str, object]]:
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(value, list):
            # A bare string is a docstring, of a module, a function or a dataclass field.
            yield name, [item for item in value if not _is_bare_string(item)]
        elif isinstance(node, ast.JoinedStr) and name == "values":
            yield name, _joined(value)
        else:
            yield name, value


def _joined(values: list[ast.expr]) -> list[ast.expr]:
    """The parts of an f-string, its texts as long as can be: versions cut them differently."""
    found: list[ast.expr] = []
    for is_text, group in groupby(values, lambda value: isinstance(value, ast.Constant)):
        if not is_text:
            found += group
        elif text := "".join(ast.literal_eval(value) for value in group):
            found.append(ast.Constant(text))
    return found


def _is_bare_string(item: object) -> bool:
    return (
        isinstance(item, ast.Expr)
        and isinstance(item.value, ast.Constant)
        and isinstance(item.value.value, str)
    )
