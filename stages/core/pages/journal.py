"""A journal of decisions: JSON lines, each on the disk before the next decision is asked for."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from threading import Lock
from typing import IO, Any

from stages.core.errors import UserError
from stages.core.execution.disk import writing
from stages.core.execution.locks import try_lock

log = logging.getLogger(__name__)

Entry = dict[str, Any]

UNDOES = "undoes"
"""Key of an entry that takes another one back: its value is the other's number."""


class Journal:
    """An append-only file of entries that one process writes, within a `with` block.

    An entry is on the disk when `append` returns: a process that is killed loses none. A line that
    was half written at that moment is cut off at the next start. UserError at the start if another
    process holds the journal, or if a line before the last is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: list[Entry] = []
        self._turn = Lock()

    def __enter__(self) -> Journal:
        with ExitStack() as opened, writing(self.path):
            opened.enter_context(_lock(self.path))
            self._file = opened.enter_context(self.path.open("ab", buffering=0))
            self._repair()
            _fsync_folder(self.path.parent)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._turn:
            self._opened.close()

    def append(self, entry: Mapping[str, Any]) -> int:
        """Write an entry, and wait until the disk has it; its number, from 0.

        DiskError if the disk does not take it: the journal is then as it was.
        """
        line = _line(entry)
        with self._turn, writing(self.path):
            size = os.fstat(self._file.fileno()).st_size
            try:
                _write(self._file, line)
            except OSError:
                self._file.truncate(size)
                raise
            self._entries.append(json.loads(line))
            return len(self._entries) - 1

    def undo(self, number: int, **more: Any) -> int:
        """Take an entry back, by an entry of its own; the number of that one."""
        return self.append({UNDOES: number, **more})

    def entries(self) -> list[Entry]:
        """All entries in their order, those that were taken back and those that take back too."""
        with self._turn:
            return list(self._entries)

    def _repair(self) -> None:
        """Read what is there; cut off a last line that is not whole."""
        data = self.path.read_bytes()
        self._entries, size = _parse(self.path, data)
        if size < len(data):
            log.warning(
                "%s: its last line, which was being written when the process was killed, is cut off: %r",
                self.path, data[size:][:200],
            )  # fmt: skip
            self._file.truncate(size)
        if size and data[size - 1 : size] != b"\n":
            _write(self._file, b"\n")
        os.fsync(self._file.fileno())


def read_journal(path: Path) -> list[Entry]:
    """All entries of a journal that another process may be writing; a torn last line is left out.

    UserError if there is no journal, or if another line is damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected a journal of decisions")
    return _parse(path, path.read_bytes())[0]


def standing(entries: Iterable[Entry]) -> dict[int, Entry]:
    """The decisions that hold, by their numbers: neither taken back nor taking back."""
    numbered = dict(enumerate(entries))
    undone = {entry[UNDOES] for entry in numbered.values() if UNDOES in entry}
    return {
        number: entry
        for number, entry in numbered.items()
        if UNDOES not in entry and number not in undone
    }


def _lock(path: Path) -> IO[str]:
    lock = path.with_name(f"{path.name}.lock")
    try:
        with writing(lock):
            file = try_lock(lock)
    except OSError as error:
        raise UserError(
            f"{lock} cannot be locked ({error.strerror}), so two servers could write to {path} at once. "
            "Keep the journal on a local disk."
        ) from error
    if file is None:
        raise UserError(
            f"{path} is written by another server, process {lock.read_text().strip() or '?'}. Use that "
            "one (several people and windows may), end it, or name another file."
        )
    return file


def _line(entry: Mapping[str, Any]) -> bytes:
    """The entry as one line of ASCII; a text that no UTF-8 file can hold comes through too."""
    return json.dumps(dict(entry), allow_nan=False).encode("ascii") + b"\n"


def _write(file: Any, line: bytes) -> None:
    done = 0
    while done < len(line):
        done += file.write(line[done:])
    os.fsync(file.fileno())


def _parse(path: Path, data: bytes) -> tuple[list[Entry], int]:
    """(entries, bytes of the whole ones). UserError if a line is damaged that ends in a newline."""
    entries: list[Entry] = []
    size = 0
    for number, line in enumerate(io.BytesIO(data), start=1):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            entries.append(entry)
            size += len(line)
        elif line.endswith(b"\n"):
            raise UserError(
                f"{path}, line {number}: found {line[:80]!r}, expected a JSON object. Something else has "
                "written to the file: put it back from a copy, or take the line out."
            )
    return entries, size


def _fsync_folder(folder: Path) -> None:
    """Have the disk keep the name of a new file too."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
