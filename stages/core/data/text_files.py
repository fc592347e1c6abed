"""Text files that people bring, read row by row: CSV, TSV, JSON, JSON lines and plain lines."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.core.errors import UserError

Record = dict[str, Any]

RECORD_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson")
SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")
SHEET_HINT = "a spreadsheet is not read: save its sheet as 'CSV UTF-8' and name that file"

MAX_DEPTH = 20
"""Levels of lists and objects in a JSON value."""

PROBLEM = "\x00problem"
"""Key of a record that could not be read; its value says why."""
LINE = "\x00line"
"""Key of the line, from 1, on which a record of a text file begins."""
HIDDEN = (PROBLEM, LINE)
"""Keys that are no columns."""

DELIMITERS = ",;\t|"
"""What may stand between the cells of a .csv file; spreadsheets of many countries write semicolons."""


def kind_of(path: Path) -> str:
    """What a file's name says it is: its ending in small letters, without a .gz after it."""
    kind = path.suffix.lower()
    return Path(path.stem).suffix.lower() if kind == ".gz" else kind


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


def _opened(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _whole_lines(path: Path) -> Iterator[str]:
    """The lines with their ends, from UTF-8 or, where its mark stands at the beginning, from UTF-16."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        with _opened(path) as file:
            start = file.read(2)
        is_wide = start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        encoding = "utf-16" if is_wide else "utf-8-sig"
        with (
            _opened(path) as file,
            io.TextIOWrapper(file, encoding=encoding, newline="") as text,
        ):
            yield from text
    except UnicodeDecodeError as error:
        if is_wide:
            raise UserError(f"{path} is no whole UTF-16 text: {error}. Save it as UTF-8.") from None
        raise UserError(_where_not_utf8(path)) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is no readable gzip file: {error}") from None


def read_records(path: Path, *, has_literal_quotes: bool = False) -> Iterator[Record]:
    """The rows of a .csv, .tsv, .json or .jsonl file, which may be gzipped, each with its `LINE`.

    A .csv file is cut at what its head is cut at, or what its first line `sep=;` names. A .tsv file
    is read with quotes if every quote in it is one of CSV's, else, or with `has_literal_quotes`,
    without. A .json file is a list of objects or of texts (read as prompts), or lines of objects. A
    row that cannot be read is a record with the key `PROBLEM`. UserError if the file as a whole
    cannot be read.
    """
    kind = kind_of(path)
    if kind in (".jsonl", ".ndjson"):
        yield from _read_json_lines(path)
    elif kind == ".json":
        yield from _read_json(path)
    elif kind in (".csv", ".tsv"):
        yield from _read_table(path, has_literal_quotes=has_literal_quotes)
    else:
        hint = f"; {SHEET_HINT}" if kind in SPREADSHEETS else ""
        raise UserError(
            f"{path}: expected {', '.join(RECORD_SUFFIXES)}, found {path.suffix!r}{hint}"
        )


def column_names(path: Path) -> list[str]:
    """The columns of a .csv or .tsv file's head, or the keys of all rows of a JSON file."""
    if kind_of(path) in (".csv", ".tsv"):
        return [name for name in _head(path) if name]
    names: dict[str, None] = {}
    for record in read_records(path):
        names |= dict.fromkeys(key for key in record if key not in HIDDEN and key.strip())
    return list(names)


def _head(path: Path) -> list[str]:
    """The names in a table's head; an index column, as pandas writes, has none."""
    _line, names = next(_rows(path, has_literal_quotes=False), (1, []))
    return [name.strip() for name in names]


def _rows(path: Path, *, has_literal_quotes: bool) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each row that is not empty."""
    lines = _whole_lines(path)  # a line's end inside quotes is part of the text
    first = next(lines, "")
    skipped = 0
    delimiter = "\t" if kind_of(path) == ".tsv" else None
    if first.lower().startswith("sep=") and len(first.strip()) == len("sep=") + 1:
        delimiter, skipped = first.strip()[-1], 1
        first = next(lines, "")
    if delimiter is None:
        delimiter = _delimiter(first)
    is_literal = delimiter == "\t" and (has_literal_quotes or not _is_quoted(path, skipped))
    reader = csv.reader(
        _with_first(first, lines), delimiter=delimiter,
        quoting=csv.QUOTE_NONE if is_literal else csv.QUOTE_MINIMAL,
        skipinitialspace=not is_literal,
    )  # fmt: skip
    line = 1 + skipped
    try:
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1 + skipped
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num + skipped}: {error}") from error


def _with_first(first: str, lines: Iterator[str]) -> Iterator[str]:
    if first:
        yield first
    yield from lines


def _delimiter(head: str) -> str:
    """What the names of a head stand between: the comma, unless there is none and another there."""
    unquoted = "".join(head.split('"')[::2])
    return max(DELIMITERS, key=lambda mark: (unquoted.count(mark) > 0, mark == ",",
                                             unquoted.count(mark)))  # fmt: skip


def _is_quoted(path: Path, skipped: int) -> bool:
    """Whether all quotes of a tab-separated file are CSV's: pandas and Excel write them, others do not."""
    lines = _whole_lines(path)
    for _ in range(skipped):
        next(lines, None)
    has_quotes, width = False, 0
    seen: list[str] = []
    try:
        for row in csv.reader(_noting(lines, seen), delimiter="\t", strict=True):
            width = width or len(row)
            if row and len(row) != width:
                return False
            has_quotes = has_quotes or any('"' in line for line in seen)
            seen.clear()
    except csv.Error:
        return False
    return has_quotes


def _noting(lines: Iterator[str], seen: list[str]) -> Iterator[str]:
    for line in lines:
        seen.append(line)
        yield line


def _read_table(path: Path, *, has_literal_quotes: bool) -> Iterator[Record]:
    rows = _rows(path, has_literal_quotes=has_literal_quotes)
    names = [name.strip() for name in next(rows, (1, []))[1]]
    for line, row in rows:
        if len(row) == len(names):
            cells = {name: cell for name, cell in zip(names, row, strict=True) if name}
            yield {LINE: line, **cells}
        else:
            yield {LINE: line, PROBLEM: f"{len(row)} cells under a head of {len(names)}"}


def _read_json_lines(path: Path) -> Iterator[Record]:
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            yield {LINE: number, **_parse_line(line)}


def _read_json(path: Path) -> Iterator[Record]:
    text = "\n".join(read_lines(path))
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        if _is_lines(text):  # pandas, datasets and jq write lines into files of any name
            yield from _read_json_lines(path)
            return
        raise UserError(f"{path} is no readable JSON: {error}") from error
    if not isinstance(values, list):
        raise UserError(
            f"{path} holds {type(values).__name__}; expected a list of rows, as pandas writes with "
            "orient='records'"
        )
    yield from map(_as_record, values)


def _is_lines(text: str) -> bool:
    """Whether the first two lines that are not empty are JSON objects of their own."""
    lines = (line for line in text.split("\n") if line.strip())
    first = [line for line, _ in zip(lines, range(2), strict=False)]
    try:
        return len(first) == 2 and all(isinstance(json.loads(line), dict) for line in first)
    except (ValueError, RecursionError):
        return False


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
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return (
                    f"{path}, line {number}: byte {error.start + 1} of the line is "
                    f"0x{line[error.start]:02x}; the file is not UTF-8 text. Save it as UTF-8."
                )
    return f"{path} is not UTF-8 text. Save it as UTF-8."
