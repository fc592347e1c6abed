"""Markdown of a card: its head, tables, and texts that stay texts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

MARK = "<!-- written by SAIL; an export may replace this folder -->"
"""What tells a folder of our own, which may be replaced, from anything else."""


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
