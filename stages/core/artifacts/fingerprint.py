"""A digest of what a stage's code does, which comments, docstrings and layout leave alone.

A file that lies beside a module and is named in it, as a template, is part of the code.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


@cache
def code_version(module: str) -> str:
    """Digest of the module and of all of the project's modules that it imports, directly or not."""
    combined = hashlib.sha256()
    for name in sorted(_closure(module)):
        combined.update(f"{name}:{_module_digest(name)}\n".encode())
    return combined.hexdigest()[:12]


def _closure(module: str) -> set[str]:
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen or _path(name) is None:
            continue
        seen.add(name)
        waiting.extend(_imports(name))
    return seen


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
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        # A bare string is a docstring, of a module, a function or a dataclass field.
        kept = [item for item in body if not _is_bare_string(item)]
        node.body = kept  # type: ignore[attr-defined]
    dumped = ast.dump(tree)
    digest = hashlib.sha256(dumped.encode())
    place = _path(module)
    assert place is not None
    for path in _files_in(place.parent):
        if f"Constant(value={path.name!r}" in dumped:
            digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _files_in(folder: Path) -> list[Path]:
    """Files that are no code."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix != ".py")


def _is_bare_string(item: object) -> bool:
    return (
        isinstance(item, ast.Expr)
        and isinstance(item.value, ast.Constant)
        and isinstance(item.value.value, str)
    )
