"""Config blocks as command-line flags, quoted for the shell; and which texts cannot be words of it."""

from __future__ import annotations

import shlex
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MAX_WORD_LETTERS = 4096
"""The longest path that Linux takes."""


def flags(values: Mapping[str, Any], prefix: str = "") -> str:
    """The values as flags, in rising order of their names: {'num_draws': 10} is '--num-draws 10'.

    With a prefix the flags are nested as tyro has them: '--settings.dpo-beta 5000.0'.
    """
    words: list[str] = []
    for name in sorted(values):
        flag = ".".join(filter(None, [prefix, name])).replace("_", "-")
        value = values[name]
        if isinstance(value, list | tuple):
            words += [f"--{flag}", *(shlex.quote(str(item)) for item in value)]
        else:
            words += [f"--{flag}", shlex.quote(str(value))]
    return " ".join(words)


def numbered(flag: str, rows: Iterable[Iterable[Any]]) -> str:
    """A flag whose values are the rows' words, row by row: [(1, 'a.parquet')] is '--scores 1 a.parquet'.

    The flag stands there without values where there are no rows.
    """
    return flags({flag: [word for row in rows for word in row]})


def tables(**rows: Sequence[Iterable[Any]]) -> str:
    """Such flags in one, in rising order of their names; one that has no rows is left out."""
    return " ".join(numbered(flag, rows[flag]) for flag in sorted(rows) if rows[flag])


def word_problem(text: str) -> str | None:
    """Why a text of the config, or a file's name, is no safe word of a command; None if it is one.

    Spaces, quotes, $, backticks, ; and the like are safe: they are quoted.
    """
    if len(text) > MAX_WORD_LETTERS:
        return f"it has {len(text):,} letters; at most {MAX_WORD_LETTERS:,} are taken"
    if text.startswith("-"):
        return "it begins with '-', as a flag does; write ./ before a file's name"
    for letter in text:
        if unicodedata.category(letter) in ("Cc", "Cs"):
            return (
                f"it holds the control character U+{ord(letter):04X}; line breaks, NUL and bytes "
                "that are not UTF-8 cannot stand in a name or a flag"
            )
    for letter in "{}<>":
        if letter in text:
            return f"it holds {letter!r}, which Snakemake takes for a wildcard; rename it"
    return None
