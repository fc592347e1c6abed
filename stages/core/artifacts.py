"""Checked, atomic reading and writing of what the stages exchange: tables, JSON and policy folders."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from functools import lru_cache
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from psutil import pid_exists

from stages.core.arrow_files import naming
from stages.core.disk import writing
from stages.core.errors import UserError
from stages.core.fingerprint import code_version
from stages.core.schemas import Schema

ROW_GROUP_ROWS = 256
ROW_GROUP_BYTES = 2**26
"""A row group of large images is closed before it holds `ROW_GROUP_ROWS` rows."""

BASE = "base"
"""How flags name the untouched base model where a policy folder could stand."""


class ArtifactError(UserError):
    """An artifact that is missing or not what it should be; the message says what to do."""


def read_table(path: Path, schema: Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """The table at `path`, or some of its columns, checked against `schema`.

    ArtifactError names the file and the column that is missing, of another type, or null.
    """
    file = _open_parquet(path)
    fields = _wanted(path, file, schema, columns)
    names = [field.name for field in fields]
    # One row group at a time: Arrow's 32-bit offsets do not reach over a whole table's images.
    with naming(path, error_type=ArtifactError):
        groups = [file.read_row_group(group, columns=names) for group in range(file.num_row_groups)]
        table = pa.concat_tables(groups) if groups else file.read(columns=names)
        _check_texts(table)
    _refuse_nulls(path, table, fields)
    return table


def read_batches(
    path: Path,
    schema: Schema,
    columns: Sequence[str] | None = None,
    *,
    size: int,
    rows: Sequence[int] | None = None,
) -> Iterator[pa.Table]:
    """The table in parts of `size` rows, checked as `read_table` does; one row group is in memory.

    `rows` are the positions to read, in rising order; None reads all. ValueError unless size > 0.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, found {size}")
    file = _open_parquet(path)
    fields = _wanted(path, file, schema, columns)
    names = [field.name for field in fields]
    waiting: list[pa.Table] = []
    start = 0
    for group in range(file.num_row_groups):
        stop = start + file.metadata.row_group(group).num_rows
        inside = [row - start for row in _between(rows, start, stop)] if rows is not None else None
        if inside is None or inside:
            with naming(path, error_type=ArtifactError):
                table = file.read_row_group(group, columns=names)
                _check_texts(table)
            _refuse_nulls(path, table, fields, first_row=start)
            waiting.append(table if inside is None else table.take(inside))
        while sum(map(len, waiting)) >= size:
            whole = pa.concat_tables(waiting)
            yield whole.slice(0, size)
            waiting = [whole.slice(size)]
        start = stop
    if sum(map(len, waiting)):
        yield pa.concat_tables(waiting)


def num_rows(path: Path) -> int:
    """How many rows the table at `path` has."""
    count: int = _open_parquet(path).metadata.num_rows
    return count


def read_tables(
    paths: Sequence[Path], schema: Schema, columns: Sequence[str] | None = None
) -> pa.Table:
    """Several tables of one schema, one after the other."""
    tables = [read_table(path, schema, columns) for path in paths]
    return pa.concat_tables([table.replace_schema_metadata(None) for table in tables])


def read_metadata(path: Path) -> dict[str, Any]:
    """How the table at `path` was made: schema, stage, arguments, code version, input digests."""
    raw = _open_parquet(path).schema_arrow.metadata or {}
    return {
        key.decode(errors="replace").removeprefix("sail_"): _maybe_json(
            value.decode(errors="replace")
        )
        for key, value in raw.items()
        if key.startswith(b"sail_")
    }


def write_table(
    path: Path,
    rows: Sequence[Mapping[str, Any]] | pa.Table,
    schema: Schema,
    *,
    stage: str,
    arguments: object,
    inputs: Sequence[Path] = (),
) -> pa.Table:
    """Write rows as a table of `schema`, complete or not at all; the table as written.

    The file's metadata records the schema, the stage, its arguments, the code version and the
    digests of its inputs. ArtifactError if a row does not fit the schema.
    """
    table = _fitting(rows, path, schema, provenance(stage, arguments, inputs))
    with replacing(path) as part:
        pq.write_table(
            table, part, compression="zstd", row_group_size=ROW_GROUP_ROWS, write_page_checksum=True
        )
    return table


class TableWriter:
    """Takes the rows of a table some at a time; what `writing_table` gives."""

    def __init__(self, path: Path, part: Path, schema: Schema, made_by: dict[str, str]) -> None:
        self._path, self._schema, self._made_by = path, schema, made_by
        self._file = pq.ParquetWriter(
            part, schema.with_metadata(made_by), compression="zstd", write_page_checksum=True
        )
        self._waiting: list[pa.Table] = []
        self.num_rows = 0

    def write(self, rows: Sequence[Mapping[str, Any]] | pa.Table) -> None:
        """Add rows. ArtifactError if one does not fit the schema."""
        table = _fitting(rows, self._path, self._schema, self._made_by)
        self.num_rows += len(table)
        self._waiting.append(table)
        while sum(map(len, self._waiting)) >= ROW_GROUP_ROWS:
            self._write_group(ROW_GROUP_ROWS)
        if sum(part.nbytes for part in self._waiting) >= ROW_GROUP_BYTES:
            self._write_group(ROW_GROUP_ROWS)

    def close(self) -> None:
        """Write what is waiting."""
        if sum(map(len, self._waiting)) or self.num_rows == 0:
            self._write_group(ROW_GROUP_ROWS)
        self._file.close()

    def _write_group(self, size: int) -> None:
        layout = self._schema.with_metadata(self._made_by)
        whole = pa.concat_tables(self._waiting) if self._waiting else layout.empty_table()
        self._file.write_table(whole.slice(0, size), row_group_size=size)
        self._waiting = [whole.slice(size)] if len(whole) > size else []


@contextmanager
def writing_table(
    path: Path, schema: Schema, *, stage: str, arguments: object, inputs: Sequence[Path] = ()
) -> Iterator[TableWriter]:
    """Write a table larger than memory: as `write_table`, with the rows given to a TableWriter.

    The file stands at `path` when the block ends well, and not at all if it does not.
    """
    with replacing(path) as part:
        writer = TableWriter(path, part, schema, provenance(stage, arguments, inputs))
        try:
            yield writer
        except BaseException:
            writer._file.close()
            raise
        writer.close()


def write_rows(
    path: Path,
    rows: Iterable[Mapping[str, Any]],
    schema: Schema,
    *,
    stage: str,
    arguments: object,
    inputs: Sequence[Path] = (),
) -> int:
    """As `write_table`, of rows that are made one after the other; how many there were."""
    with writing_table(path, schema, stage=stage, arguments=arguments, inputs=inputs) as writer:
        for row in rows:
            writer.write([row])
        return writer.num_rows


def write_text(path: Path, text: str) -> None:
    """Write a text file, complete or not at all."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file, complete or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, default=str) + "\n")


def write_manifest(
    folder: Path, *, stage: str, arguments: object, inputs: Sequence[Path], facts: Mapping[str, Any]
) -> Path:
    """Complete a policy folder: its files with digests, and how they were made. Written last."""
    files = {
        str(file.relative_to(folder)): digest(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "manifest.json" and not file.name.endswith(".part")
    }
    path = folder / "manifest.json"
    write_record(path, {"files": files, **facts}, stage=stage, arguments=arguments, inputs=inputs)
    return path


def write_record(
    path: Path, facts: Mapping[str, Any], *, stage: str, arguments: object, inputs: Sequence[Path]
) -> None:
    """Write facts as a JSON file, with how they were made."""
    record = {**facts, **provenance(stage, arguments, inputs)}
    write_json(path, {key: _maybe_json(value) for key, value in record.items()})


def policy_digest(folder: Path) -> str:
    """What names a policy's weights. ArtifactError unless the folder is complete and undamaged."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise ArtifactError(
            f"{folder} is no finished policy: it has no manifest.json. Run the stage that trains "
            "it to its end (snakemake continues an interrupted training)."
        )
    try:
        files: dict[str, str] = dict(json.loads(path.read_text())["files"].items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is no readable manifest ({error}). Delete it and run snakemake again."
        ) from error
    for name, expected in files.items():
        file = folder / name
        if not is_inside(name) or not isinstance(expected, str):
            raise ArtifactError(
                f"{path} lists {name!r}: {expected!r}; expected names of files below {folder} with "
                "their sha256. Delete it and run snakemake again."
            )
        if not file.is_file() or digest(file) != expected:
            raise ArtifactError(
                f"{file} is missing or is not what manifest.json lists (expected sha256 "
                f"{expected[:12]}...). Delete {path} and run snakemake again."
            )
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


def is_inside(name: str) -> bool:
    """Whether a relative path stays in its folder, by its name alone."""
    path = PurePosixPath(name)
    return (
        bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
    )


def policy_name(policy: str) -> str:
    """A digest of a policy folder's weights, or 'base'."""
    return BASE if policy == BASE else policy_digest(Path(policy))


def policy_files(policy: str) -> list[Path]:
    """The file that stands for a policy among an artifact's inputs."""
    return [] if policy == BASE else [Path(policy) / "manifest.json"]


def provenance(stage: str, arguments: object, inputs: Sequence[Path]) -> dict[str, str]:
    """How an artifact is made, as metadata: every value is text, most of it JSON."""
    values = (
        asdict(arguments)
        if is_dataclass(arguments) and not isinstance(arguments, type)
        else arguments
    )
    return {
        "sail_stage": stage,
        "sail_code": code_version(f"stages.{stage}"),
        "sail_arguments": json.dumps(values, sort_keys=True, default=str),
        "sail_inputs": json.dumps({str(path): digest(path) for path in inputs}, sort_keys=True),
    }


def digest(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; run the stage that writes it first")
    facts = path.stat()
    return _digest(path.resolve(), facts.st_size, facts.st_mtime_ns, facts.st_ino)


@lru_cache(maxsize=4096)
def _digest(path: Path, _size: int, _mtime_ns: int, _inode: int) -> str:
    """Read once for all tables that a stage makes of the file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; moved there when the block ends well, removed if not.

    DiskError if the disk is full or read-only.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        try:
            yield part
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes have left half-written beside `path`, to be renamed to it."""
    for leftover in path.parent.glob(f".{escape(path.name)}.*.*"):
        writer, _, kind = leftover.name.removeprefix(f".{path.name}.").partition(".")
        if kind not in ("part", "old") or not writer.isdecimal():
            continue
        if int(writer) != os.getpid() and pid_exists(int(writer)):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _open_parquet(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; run the stage that writes it first")
    with naming(path, error_type=ArtifactError):
        return pq.ParquetFile(path)


def _wanted(
    path: Path, file: pq.ParquetFile, schema: Schema, columns: Sequence[str] | None
) -> list[pa.Field]:
    """The schema's fields of these columns. ArtifactError unless the file has them."""
    fields = [schema.arrow.field(name) for name in columns or schema.arrow.names]
    found = file.schema_arrow
    for field in fields:
        if field.name not in found.names:
            raise ArtifactError(
                f"{path} has no column {field.name!r} (found: {', '.join(found.names)}); a "
                f"{schema.name} table needs it. Make the file anew with the stage that writes it."
            )
        if found.names.count(field.name) > 1:
            raise ArtifactError(
                f"{path} has {found.names.count(field.name)} columns {field.name!r}. Make the file "
                "anew with the stage that writes it."
            )
        if found.field(field.name).type != field.type:
            raise ArtifactError(
                f"{path}: column {field.name!r} is {found.field(field.name).type}, expected "
                f"{field.type}. Make the file anew with the stage that writes it."
            )
    return fields


def _check_texts(table: pa.Table) -> None:
    """ArrowInvalid where a text is not UTF-8."""
    for column in table.columns:
        if pa.types.is_string(column.type):
            column.validate(full=True)


def _refuse_nulls(
    path: Path, table: pa.Table, fields: Sequence[pa.Field], first_row: int = 0
) -> None:
    for field in fields:
        column = table.column(field.name)
        if not field.nullable and column.null_count:
            row = first_row + column.is_null().index(True).as_py()
            raise ArtifactError(f"{path}: column {field.name!r} is null in row {row}")


def _between(rows: Sequence[int], start: int, stop: int) -> Sequence[int]:
    """The rows in [start, stop), of rows in rising order."""
    return rows[bisect_left(rows, start) : bisect_left(rows, stop)]


def _fitting(
    rows: Sequence[Mapping[str, Any]] | pa.Table,
    path: Path,
    schema: Schema,
    made_by: dict[str, str],
) -> pa.Table:
    """The rows as a table of the schema. ArtifactError if one does not fit."""
    layout = schema.with_metadata(made_by)
    try:
        if isinstance(rows, pa.Table):
            table = rows.select(layout.names).cast(layout)
        else:
            table = pa.Table.from_pylist(list(rows), schema=layout)
        table.validate(full=True)
        for field in schema.arrow:
            if not field.nullable and table.column(field.name).null_count:
                raise pa.ArrowInvalid(f"column {field.name!r} has nulls")
    except (ValueError, pa.ArrowTypeError, KeyError) as error:
        raise ArtifactError(f"{path}: rows do not fit the {schema.name} schema: {error}") from error
    return table


def _maybe_json(value: Any) -> Any:
    # Only blocks and lists: a code version such as 12e3 would be read as a number.
    if not isinstance(value, str) or value[:1] not in ("{", "["):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
