"""Checked, atomic reading and writing of the tables that stages exchange."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.core.artifacts.arrow_files import naming
from stages.core.artifacts.files import replacing
from stages.core.artifacts.provenance import ArtifactError, maybe_json, provenance
from stages.core.artifacts.schemas import Schema

ROW_GROUP_ROWS = 256
ROW_GROUP_BYTES = 2**22
"""A row group of large images is closed once it holds so much: about the candidates of one prompt, so that
a page shows them without reading those of other prompts."""


def read_table(path: Path, schema: Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """The table at `path`, or some of its columns, checked against `schema`.

    ArtifactError names the file and the column that is missing, of another type, or null.
    """
    file = _open_parquet(path)
    fields = _wanted(path, file, schema, columns)
    names = [field.name for field in fields]
    with _reading(path):
        if any(pa.types.is_nested(field.type) for field in fields) and file.num_row_groups:
            # One row group at a time: Arrow's 32-bit offsets do not reach over a whole table's images.
            numbers = range(file.num_row_groups)
            table = pa.concat_tables(file.read_row_group(n, columns=names) for n in numbers)
        else:
            table = file.read(columns=names)
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
            with _reading(path):
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
        key.decode(errors="replace").removeprefix("sail_"): maybe_json(
            value.decode(errors="replace")
        )
        for key, value in raw.items()
        if key.startswith(b"sail_")
    }


def holds(path: Path, schema: Schema) -> bool:
    """Whether the table at `path` says that it is of this schema, in whatever version."""
    return str(read_metadata(path).get("schema")).partition("/")[0] == schema.name


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
    table = fitting(rows, path, schema, provenance(stage, arguments, inputs))
    with replacing(path) as part, _parquet_writer(part, table.schema) as file:
        file.write_table(table, row_group_size=_rows_of_a_group(table))
    return table


class TableWriter:
    """Takes the rows of a table some at a time; what `writing_table` gives."""

    def __init__(self, path: Path, part: Path, schema: Schema, made_by: dict[str, str]) -> None:
        self._path, self._schema, self._made_by = path, schema, made_by
        self._file = _parquet_writer(part, schema.with_metadata(made_by))
        self._waiting: list[pa.Table] = []
        self.num_rows = 0

    def write(self, rows: Sequence[Mapping[str, Any]] | pa.Table) -> None:
        """Add rows. ArtifactError if one does not fit the schema."""
        table = fitting(rows, self._path, self._schema, self._made_by)
        self.num_rows += len(table)
        self._waiting.append(table)
        while self._waiting and (
            sum(map(len, self._waiting)) >= ROW_GROUP_ROWS
            or sum(part.nbytes for part in self._waiting) >= ROW_GROUP_BYTES
        ):
            self._write_group()

    def close(self) -> None:
        """Write what is waiting."""
        if sum(map(len, self._waiting)) or self.num_rows == 0:
            self._write_group()
        self._file.close()

    def _write_group(self) -> None:
        layout = self._schema.with_metadata(self._made_by)
        whole = pa.concat_tables(self._waiting) if self._waiting else layout.empty_table()
        size = _rows_of_a_group(whole)
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


def _parquet_writer(part: Path, layout: pa.Schema) -> pq.ParquetWriter:
    """Dictionaries are for text alone: image bytes and latents seldom repeat, and looking for it costs time."""
    return pq.ParquetWriter(
        part,
        layout,
        compression="zstd",
        write_page_checksum=True,
        use_dictionary=[field.name for field in layout if pa.types.is_string(field.type)],
    )


def _rows_of_a_group(table: pa.Table) -> int:
    """At most `ROW_GROUP_ROWS`, and of large rows so many as make `ROW_GROUP_BYTES`."""
    bytes_of_a_row = max(1.0, table.nbytes / max(1, len(table)))
    return min(ROW_GROUP_ROWS, math.ceil(ROW_GROUP_BYTES / bytes_of_a_row))


def _open_parquet(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; run the stage that writes it first")
    with _reading(path):
        return pq.ParquetFile(path, page_checksum_verification=True)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """While a table is read: ArtifactError names it where it is damaged, and says what to do."""
    try:
        with naming(path, error_type=ArtifactError):
            yield
    except ArtifactError as error:
        raise ArtifactError(
            f"{error}. It is damaged, or no table of a run: delete it and call snakemake again, which makes it "
            "and what depends on it anew"
        ) from error


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
                f"{schema.name} table needs it. Make the file again with the stage that writes it."
            )
        if found.names.count(field.name) > 1:
            raise ArtifactError(
                f"{path} has {found.names.count(field.name)} columns {field.name!r}. Make the file "
                "again with the stage that writes it."
            )
        if found.field(field.name).type != field.type:
            raise ArtifactError(
                f"{path}: column {field.name!r} is {found.field(field.name).type}, expected "
                f"{field.type}. Make the file again with the stage that writes it."
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


def fitting(
    rows: Sequence[Mapping[str, Any]] | pa.Table,
    path: Path,
    schema: Schema,
    made_by: dict[str, str],
) -> pa.Table:
    """The rows as a table of the schema, to be written to `path`. ArtifactError if one does not fit."""
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
