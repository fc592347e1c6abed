"""Text files that people bring, read row by row: CSV, TSV, JSON, JSON lines and plain lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.core.errors import UserError

Record = dict[str, Any]

RECORD_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")

MAX_DEPTH = 20
"""Levels of lists and objects in a JSON value."""

PROBLEM = "\x00problem"
"""Key of a record that could not be read; its value says why."""


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text file, without their ends. UserError names a byte that is not."""
    for line in _whole_lines(path):
        yield line.rstrip("\r\n")


def not_utf8(text: str) -> str | None:
    """What no UTF-8 file can hold of a text: half a character, as JSON can spell it; None if nothing."""
    half = next((letter for letter in text if "\ud800" <= letter <= "\udfff"), None)
    if half is None:
        return None
    return f"it holds U+{ord(half):04X}, half of a character, which no file can hold. Remove it."


def _whole_lines(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError:
        raise UserError(_where_not_utf8(path)) from None


def read_records(path: Path) -> Iterator[Record]:
    """The rows of a .csv, .tsv, .json or .jsonl file.

    A .tsv file knows no quotes: what stands between two tabs is the text. A .json file is a list of
    objects or of texts (read as prompts). A row that cannot be read is a record with the key
    `PROBLEM`. UserError if the file as a whole cannot be read.
    """
    if path.suffix == ".jsonl":
        yield from map(_parse_line, (line for line in read_lines(path) if line.strip()))
    elif path.suffix == ".json":
        yield from _read_json(path)
    elif path.suffix in (".csv", ".tsv"):
        yield from _read_table(path)
    else:
        raise UserError(f"{path}: expected {', '.join(RECORD_SUFFIXES)}, found {path.suffix!r}")


def column_names(path: Path) -> list[str]:
    """The columns of a .csv or .tsv file's head, or the keys of the first rows of a JSON file."""
    if path.suffix in (".csv", ".tsv"):
        return next(_rows(path), [])
    names: dict[str, None] = {}
    for number, record in enumerate(read_records(path)):
        names |= dict.fromkeys(key for key in record if key != PROBLEM)
        if number == 9:
            break
    return list(names)


def _rows(path: Path) -> Iterator[list[str]]:
    lines = _whole_lines(path)  # a line's end inside quotes is part of the text
    if path.suffix == ".tsv":
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(lines)
    try:
        for row in reader:
            if row:
                yield row
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from error


def _read_table(path: Path) -> Iterator[Record]:
    rows = _rows(path)
    names = next(rows, [])
    for row in rows:
        if len(row) == len(names):
            yield dict(zip(names, row, strict=True))
        else:
            yield {PROBLEM: f"{len(row)} cells under a head of {len(names)}"}


def _read_json(path: Path) -> Iterator[Record]:
    text = "\n".join(read_lines(path))
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no readable JSON: {error}") from error
    if not isinstance(values, list):
        raise UserError(f"{path} holds {type(values).__name__}; expected a list of rows")
    yield from map(_as_record, values)


def _parse_line(line: str) -> Record:
    try:
        return _as_record(json.loads(line))
    except (ValueError, RecursionError) as error:
        return {PROBLEM: f"the line is no readable JSON: {error}"}


def _as_record(value: Any) -> Record:
    if isinstance(value, str):
        return {"prompt": value}
    if isinstance(value, dict):
        if _is_deep(value):
            return {PROBLEM: f"the row is nested deeper than {MAX_DEPTH} levels"}
        return value
    return {PROBLEM: f"expected an object or a text, found {type(value).__name__}"}


def _is_deep(value: Any) -> bool:
    waiting = [(value, 0)]
    while waiting:
        node, depth = waiting.pop()
        if depth > MAX_DEPTH:
            return True
        inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        waiting += [(item, depth + 1) for item in inner if isinstance(item, dict | list)]
    return False


def _where_not_utf8(path: Path) -> str:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return (
                    f"{path}, line {number}: byte {error.start + 1} of the line is "
                    f"0x{line[error.start]:02x}; the file is not UTF-8 text. Save it as UTF-8."
                )
    return f"{path} is not UTF-8 text. Save it as UTF-8."
