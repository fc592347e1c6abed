"""Rows of any file that holds labels, a few in memory at a time."""

from __future__ import annotations

import json
import lzma
import tarfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.core.artifacts.arrow_files import naming
from stages.core.data.text_files import PROBLEM, RECORD_SUFFIXES, Record, column_names, read_records
from stages.core.errors import UserError

SUFFIXES = (".parquet", ".arrow", ".tar", *RECORD_SUFFIXES)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")

STREAM = "Arrow stream"

MAX_FILE_BYTES = 2**28
"""Of an image file, and of a member of a webdataset."""

ROWS_AT_ONCE = 32
"""Of rows with images."""
TEXT_ROWS_AT_ONCE = 4096
BUFFER = 2**20
"""Bytes of a column that are read at a time; without it pyarrow reads a whole row group's."""


def columns_of(file: Path) -> list[str]:
    """The columns of a file. UserError if it cannot be read."""
    if not file.is_file():
        raise UserError(f"{file} does not exist; preferences.files must name files of labels")
    if file.suffix == ".parquet":
        with naming(file):
            return list(_parquet(file).schema_arrow.names)
    if file.suffix == ".arrow":
        with naming(file, STREAM), _arrow(file) as stream:
            return list(stream.schema.names)
    if file.suffix == ".tar":
        return [name for name in next(_samples(file), {}) if name != PROBLEM]
    return column_names(file)


def read_rows(
    file: Path, columns: Sequence[str], *, with_images: bool, only: Collection[int] | None = None
) -> Iterator[tuple[int, Record]]:
    """(number, values) of a file's rows, from 0; `only` some of them, at less cost."""
    if file.suffix == ".parquet":
        with naming(file):
            yield from _parquet_rows(file, columns, with_images=with_images, only=only)
    elif file.suffix == ".arrow":
        with naming(file, STREAM):
            yield from _arrow_rows(file, columns, only=only)
    else:
        rows = _samples(file) if file.suffix == ".tar" else read_records(file)
        for number, row in enumerate(rows):
            if only is None or number in only:
                yield number, row


def read_cell(value: Any, folder: Path) -> tuple[bytes | None, str | None]:
    """(bytes, problem) of an image cell: bytes, the path of a file in `folder`, or both in a struct."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value, None
    if isinstance(value, str) and value:
        return read_file(folder, value)
    return None, "the image has no bytes"


def read_file(folder: Path, name: str) -> tuple[bytes | None, str | None]:
    """(bytes, problem) of an image file that lies in `folder`."""
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            return None, f"the path {name[:200]!r} leaves the data folder {folder}"
        if not path.is_file():
            return None, f"the image {name[:200]!r} does not exist in {folder}"
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            return None, _too_large(name, size)
        return path.read_bytes(), None
    except (OSError, ValueError, RuntimeError) as error:  # too long, with NUL, links in a circle
        reason = error.strerror if isinstance(error, OSError) else error
        return None, f"the image {name[:200]!r} cannot be read: {reason}"


def _too_large(name: str, size: int) -> str:
    return f"{name!r} has {size:,} bytes; at most {MAX_FILE_BYTES:,} are read"


def _parquet(file: Path) -> pq.ParquetFile:
    return pq.ParquetFile(file, buffer_size=BUFFER)


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
