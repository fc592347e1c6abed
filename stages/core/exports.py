"""Folders that other tools open: written beside and renamed, with a card and a manifest."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from stages.core.artifacts import digest, provenance, remove_leftovers, write_json, write_text
from stages.core.disk import writing
from stages.core.errors import UserError

CARD = "README.md"
MANIFEST = "manifest.json"
MARK = "<!-- written by SAIL; an export may replace this folder -->"
"""What tells a folder of our own, which may be replaced, from anything else."""


@contextmanager
def export_folder(output: Path, *, is_ours: bool = False) -> Iterator[Path]:
    """A folder beside `output` to write to; takes its place when the block ends well.

    UserError if there is something at `output` that is no export of ours, unless the caller knows
    that it is; DiskError if the disk is full or read-only.
    """
    if not is_ours:
        check_replaceable(output)
    new, old = (output.with_name(f".{output.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output)
        new.mkdir()
        try:
            yield new
            if output.exists():
                output.replace(old)
            new.replace(output)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def check_replaceable(output: Path) -> None:
    """UserError unless `output` does not exist, is empty, or is an export of ours."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    card = output / CARD
    if card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace"):
        return
    found = "a file" if output.is_file() else "a folder that no export wrote"
    raise UserError(
        f"{output} exists already and is {found}; it is left as it is. Remove it, or name another "
        "--output."
    )


def finish_export(
    folder: Path, card: str, *, stage: str, arguments: object, inputs: Sequence[Path], facts: object
) -> None:
    """Add the card, and the manifest with the digests of all other files."""
    files = {
        str(file.relative_to(folder)): digest(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    write_text(folder / CARD, card)
    made_by = {
        name: json.loads(value) if value[:1] == "{" else value
        for name, value in provenance(stage, arguments, inputs).items()
    }
    write_json(folder / MANIFEST, {"files": files, "facts": facts, **made_by})


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under another name, where the file system can; else a copy of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def front_matter(values: Mapping[str, Any]) -> str:
    """What the hub reads at the head of a card."""
    return f"---\n{yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)}---\n"


def read_front_matter(card: Path) -> dict[str, Any]:
    """The head of a card; empty where there is none that can be read."""
    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace")
    head = re.match(r"\s*---\n(.*?)^---\n", text, re.DOTALL | re.MULTILINE)
    try:
        found = yaml.safe_load(head[1]) if head else {}
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def plain_settings(arguments: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The numbers, switches and words among a stage's arguments; no path, as a card is published."""
    found: dict[str, Any] = {}
    for name, value in sorted(arguments.items()):
        if isinstance(value, Mapping):
            found |= plain_settings(value, f"{prefix}{name}.")
        elif value is not None and value != [] and "/" not in str(value):
            found[f"{prefix}{name}"] = value
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; what stands in a cell is text, whatever it looks like."""
    lines = [list(map(plain, head)), ["---"] * len(head), *(list(map(plain, row)) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


class Code(str):
    """A text that a card shows as code."""

    __slots__ = ()


def plain(value: object) -> str:
    """A value as text of a card: no markup, no link, no cell or line of its own."""
    text = " ".join(str(value).split())
    if isinstance(value, Code):
        return "`" + text.replace("`", "'").replace("|", "\\|") + "`"
    for mark, written in _WRITTEN.items():
        text = text.replace(mark, written)
    return text


_WRITTEN = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "\\|", "`": "\\`", "](": "]\\("}
"""Marks that begin a tag, a cell, code or a link, and how they are written as text."""
