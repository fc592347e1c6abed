"""Rows of any file that holds labels, a few in memory at a time."""

from __future__ import annotations

import json
import lzma
import os
import re
import tarfile
import unicodedata
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.core.artifacts.arrow_files import naming
from stages.core.data.text_files import (
    LINE,
    PROBLEM,
    RECORD_SUFFIXES,
    Record,
    column_names,
    kind_of,
    read_records,
)
from stages.core.errors import UserError

SUFFIXES = (".parquet", ".arrow", ".tar", *RECORD_SUFFIXES)
NOT_LABELS = ("manifest.json", "dataset_info.json", "dataset_infos.json", "state.json")
"""Files that tell of a folder of labels, and hold none."""
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif",
    ".jp2", ".ppm", ".pgm", ".ico",
)  # fmt: skip
"""How files that hold images are called; what they hold is decided by their bytes."""

STREAM = "Arrow stream"

MAX_FILE_BYTES = 2**28
"""Of an image file, and of a member of a webdataset."""

ROWS_AT_ONCE = 32
"""Of rows with images."""
TEXT_ROWS_AT_ONCE = 4096
BUFFER = 2**20
"""Bytes of a column that are read at a time; without it pyarrow reads a whole row group's."""


class RowNumber(int):
    """A row's number in its file, from 0, that knows the line on which the row begins."""

    line: int | None = None

    @classmethod
    def at(cls, number: int, line: int | None) -> RowNumber:
        """The number with its line."""
        found = cls(number)
        found.line = line
        return found

    def __str__(self) -> str:
        return f"{int(self)}" if self.line is None else f"{int(self)} (line {self.line})"

    def __format__(self, spec: str) -> str:
        return str(self) if not spec else format(int(self), spec)


def columns_of(file: Path) -> list[str]:
    """The columns of a file. UserError if it cannot be read."""
    if not file.is_file():
        raise UserError(f"{file} does not exist; preferences.files must name files of labels")
    kind = kind_of(file)
    if kind == ".parquet":
        with naming(file):
            return list(_parquet(file).schema_arrow.names)
    if kind == ".arrow":
        with naming(file, STREAM), _arrow(file) as stream:
            return list(stream.schema.names)
    if kind == ".tar":
        return [name for name in next(_samples(file), {}) if name != PROBLEM]
    return column_names(file)


def read_rows(
    file: Path, columns: Sequence[str], *, with_images: bool, only: Collection[int] | None = None
) -> Iterator[tuple[int, Record]]:
    """(number, values) of a file's rows, from 0; `only` some of them, at less cost."""
    kind = kind_of(file)
    if kind == ".parquet":
        with naming(file):
            yield from _parquet_rows(file, columns, with_images=with_images, only=only)
    elif kind == ".arrow":
        with naming(file, STREAM):
            yield from _arrow_rows(file, columns, only=only)
    else:
        rows = _samples(file) if kind == ".tar" else read_records(file)
        for number, row in enumerate(rows):
            if only is None or number in only:
                yield RowNumber.at(number, row.get(LINE)), row


def read_cell(value: Any, folder: Folder) -> tuple[bytes | None, str | None]:
    """(bytes, problem) of an image cell: bytes, the path of a file in `folder`, or both in a struct."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value, None
    if isinstance(value, str) and value:
        return read_file(folder, value)
    if isinstance(value, list):
        return None, f"the cell lists {len(value)} images; expected one"
    return None, "the image has no bytes"


@dataclass(frozen=True)
class Folder:
    """Where the images lie that a file names by their paths."""

    path: Path
    is_root: bool = False
    """Named by the user: links below it are followed, wherever they lead, and whole paths are read."""

    def find(self, name: str) -> tuple[Path | None, str | None]:
        """(path, problem) of the image of a name; Windows' separators and other spellings of an accented
        letter (macOS' decomposed ones) are understood.
        """
        missing: str | None = None
        for spelling in _spellings(name):
            found, problem = self._look(spelling)
            if found is not None:
                return found, None
            missing = missing or problem
        return None, missing

    def _look(self, name: str) -> tuple[Path | None, str | None]:
        path = self.path / name
        shown = f"the path {name[:200]!r} leaves the data folder {self.path}"
        if self.is_root:
            inside = Path(os.path.normpath(path)).is_relative_to(os.path.normpath(self.path))
        else:
            path = path.resolve()
            inside = path.is_relative_to(self.path.resolve())
            shown += "; preferences.root names the folder below which images may lie"
        if not inside:
            return None, shown
        if not path.is_file():
            return None, f"the image {name[:200]!r} does not exist in {self.path}"
        return path, None


def _spellings(name: str) -> Iterator[str]:
    """A path as it stands, then as another system would write it."""
    yield name
    seen = {name}
    for slashed in (name, name.replace("\\", "/")):
        for form in ("NFC", "NFD"):
            other = unicodedata.normalize(form, slashed)
            for spelling in (slashed, other):
                if spelling not in seen:
                    seen.add(spelling)
                    yield spelling


def read_file(folder: Folder, name: str) -> tuple[bytes | None, str | None]:
    """(bytes, problem) of an image file that lies in `folder`."""
    if re.match(r"(https?|s3|gs|hf)://", name):
        return None, (
            f"the image {name[:200]!r} is an address, and nothing is fetched. Download the images, and "
            "write their paths in its place"
        )
    try:
        path, problem = folder.find(name)
        if path is None:
            return None, problem
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            return None, _too_large(name, size)
        return path.read_bytes(), None
    except (OSError, ValueError, RuntimeError) as error:  # too long, with NUL, links in a circle
        reason = error.strerror if isinstance(error, OSError) else error
        return None, f"the image {name[:200]!r} cannot be read: {reason}"


def _too_large(name: str, size: int) -> str:
    return f"{name!r} has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read"


def _parquet(file: Path) -> pq.ParquetFile:
    return pq.ParquetFile(file, buffer_size=BUFFER, page_checksum_verification=True)


def _parquet_rows(
    file: Path, columns: Sequence[str], *, with_images: bool, only: Collection[int] | None
) -> Iterator[tuple[int, Record]]:
    parquet, size = _parquet(file), ROWS_AT_ONCE if with_images else TEXT_ROWS_AT_ONCE
    number = 0
    for group in range(parquet.num_row_groups):
        count = parquet.metadata.row_group(group).num_rows
        if only is not None and not any(row in only for row in range(number, number + count)):
            number += count
            continue
        for batch in parquet.iter_batches(size, row_groups=[group], columns=list(columns)):
            yield from _batch_rows(batch, number, only)
            number += len(batch)


def _arrow(file: Path) -> Any:
    """The stream of record batches that `datasets.save_to_disk` writes."""
    return pa.ipc.open_stream(pa.memory_map(str(file)))


def _arrow_rows(
    file: Path, columns: Sequence[str], *, only: Collection[int] | None
) -> Iterator[tuple[int, Record]]:
    number = 0
    with _arrow(file) as stream:
        for batch in stream:
            some = batch.select(list(columns))
            some.validate(full=True)  # a damaged stream's offsets lead out of the file
            yield from _batch_rows(some, number, only)
            number += len(batch)


def _batch_rows(
    batch: pa.RecordBatch, start: int, only: Collection[int] | None
) -> Iterator[tuple[int, Record]]:
    if only is None:
        for part in range(0, len(batch), ROWS_AT_ONCE):
            yield from enumerate(batch.slice(part, ROWS_AT_ONCE).to_pylist(), start + part)
        return
    for row in range(len(batch)):
        if start + row in only:
            yield start + row, batch.slice(row, 1).to_pylist()[0]


def _samples(file: Path) -> Iterator[Record]:
    """The samples of a webdataset: neighbouring members of one name before the first dot."""
    name, sample = "", Record()
    try:
        with tarfile.open(file) as archive:
            for member in archive:
                data = archive.extractfile(member) if member.isfile() else None
                if data is None:
                    continue
                if member.size > MAX_FILE_BYTES:
                    raise UserError(f"{file}: {_too_large(member.name, member.size)}")
                folder, _, base = member.name.rpartition("/")
                if base.startswith("._"):  # what macOS keeps beside a file
                    continue
                key, _, kind = base.partition(".")
                if f"{folder}/{key}" != name and sample:
                    yield sample
                    sample = {}
                name = f"{folder}/{key}"
                sample |= _member(kind.lower(), data.read())
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{file} is no readable tar file: {error}") from error
    if sample:
        yield sample


def _member(kind: str, data: bytes) -> Record:
    column, _, suffix = kind.rpartition(".")
    try:
        if kind == "json":
            value = json.loads(data)
            return value if isinstance(value, dict) else {}
        if kind in ("txt", "prompt.txt", "caption.txt"):
            return {"prompt": data.decode("utf-8").strip()}
    except (ValueError, RecursionError) as error:
        return {PROBLEM: f"the member .{kind} cannot be read: {error}"}
    return {column: data} if f".{suffix}" in IMAGE_SUFFIXES else {}
