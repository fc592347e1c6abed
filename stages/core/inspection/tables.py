"""What a Parquet table holds and how it was made; read one row group at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.core.artifacts.arrow_files import naming
from stages.core.artifacts.provenance import ArtifactError
from stages.core.artifacts.schemas import Schema
from stages.core.artifacts.tables import read_metadata
from stages.core.inspection.columns import Column, is_image, is_numeric
from stages.core.inspection.lineage import Lineage, lineage_of
from stages.core.inspection.units import LAYOUTS, SCHEMAS, UNITS, Layout

SURE = 2.0
"""A margin of fewer standard errors may as well be the other way round."""
NO_METADATA = (
    "it records no stage that made it: it is no table of a run, or another tool has rewritten it"
)


@dataclass(frozen=True, kw_only=True)
class Table:
    """What a table holds."""

    path: Path
    schema: str
    """Name and version, as `rewards/1`; empty for a table of other making."""
    num_rows: int
    num_bytes: int
    num_row_groups: int
    columns: Sequence[Column]
    lineage: Lineage | None
    warnings: Sequence[str]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """While the file is opened and read: ArtifactError names it where it is damaged, or no table."""
    try:
        with naming(path, error_type=ArtifactError):
            yield
    except ArtifactError as error:
        raise ArtifactError(
            f"{error}. It is damaged, or no Parquet file. If it lies under results/, delete it and call "
            "snakemake again, which makes it and what depends on it anew"
        ) from error


def read_facts(path: Path) -> Table:
    """What a Parquet file holds. ArtifactError if it is damaged, or none."""
    with _reading(path):
        file = pq.ParquetFile(path, page_checksum_verification=True)
    twice = [name for name, n in Counter(file.schema_arrow.names).items() if n > 1]
    if twice:
        raise ArtifactError(
            f"{path} has two columns {twice[0]!r}; each must have a name of its own. Write the file anew with the "
            "tool that made it"
        )
    metadata = read_metadata(path)
    schema_name, _, version = str(metadata.get("schema", "")).partition("/")
    schema, layout = SCHEMAS.get(schema_name), LAYOUTS.get(schema_name)
    columns = [_column(field, schema) for field in file.schema_arrow]
    kept_names = [field.name for field in file.schema_arrow if not _is_large(field.type)]
    kept = []
    for group in range(file.num_row_groups):
        with _reading(path):
            part = file.read_row_group(group)
            part.validate(full=True)
        for column in columns:
            column.add(part.column(column.name))
        kept.append(part.select(kept_names))
    small = pa.concat_tables(kept) if kept else file.schema_arrow.empty_table()
    lineage = lineage_of(metadata)
    found = [] if lineage else [NO_METADATA]
    found += _against_schema(file.schema_arrow, schema, version)
    found += [line for column in columns for line in column.found()]
    if len(small):
        found += _rows_found(small, columns, layout)
    else:
        found.append("it has no rows")
    return Table(
        path=path,
        schema=str(metadata.get("schema", "")),
        num_rows=len(small) if kept else 0,
        num_bytes=path.stat().st_size,
        num_row_groups=file.num_row_groups,
        columns=columns,
        lineage=lineage,
        warnings=found,
    )


def _column(field: pa.Field, schema: Schema | None) -> Column:
    """A column with the meaning that its schema gives it, or its file."""
    own = field
    if schema is not None and field.name in schema.arrow.names:
        own = schema.arrow.field(field.name)
    meaning = ((own.metadata or field.metadata or {}).get(b"description", b"")).decode(
        errors="replace"
    )
    is_ours = own is not field
    unit = UNITS.get(field.name, "") if is_ours and is_numeric(field.type) else ""
    return Column(
        name=field.name,
        type="image"
        if is_image(field.type)
        else str(field.type).replace("element: ", "").replace("item: ", ""),
        meaning=meaning,
        unit=unit,
        is_nullable=own.nullable,
    )


def _is_large(kind: pa.DataType) -> bool:
    """Whether values of a type are not kept: images, latents, errors of every draw, bytes."""
    return bool(
        pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    )


def _against_schema(found: pa.Schema, schema: Schema | None, version: str) -> Iterator[str]:
    """How a file's columns differ from those of its schema."""
    if schema is None:
        return
    if version != str(schema.version):
        yield (
            f"it was written as {schema.name}/{version}; this version of SAIL knows {schema.name}/"
            f"{schema.version}"
        )
    for field in schema.arrow:
        if field.name not in found.names:
            yield f"column {field.name!r} of its schema is missing"
        elif found.field(field.name).type != field.type:
            yield f"column {field.name!r} is {found.field(field.name).type}, its schema says {field.type}"
    for name in found.names:
        if name not in schema.arrow.names:
            yield f"column {name!r} is not in its schema"


def _rows_found(table: pa.Table, columns: Sequence[Column], layout: Layout | None) -> Iterator[str]:
    """What is odd about rows together: repeats, uneven groups, ties, margins that are not sure."""
    if layout is not None and {*layout.key} <= {*table.column_names}:
        yield from _repeats(table, layout)
        if layout.group:
            yield from _uneven(table, layout)
        if layout.ranked_by in table.column_names and layout.group:
            yield from _ties(table, layout)
    if {"margin", "margin_standard_error", "source"} <= {*table.column_names}:
        yield from _unsure(table)
    digests = {column.name: column.image_digests for column in columns}
    if digests.get("winner") and digests.get("loser"):
        both = zip(digests["winner"], digests["loser"], strict=True)
        alike = sum(winner is not None and winner == loser for winner, loser in both)
        if alike:
            yield f"winner and loser are the same image in {alike} of {len(table)} pairs"


def _repeats(table: pa.Table, layout: Layout) -> Iterator[str]:
    rows = zip(*(table.column(name).to_pylist() for name in layout.key), strict=True)
    counts = Counter(rows)
    repeated = [key for key, count in counts.items() if count > 1]
    if repeated:
        yield (
            f"{sum(counts[key] - 1 for key in repeated)} rows repeat another's {', '.join(layout.key)}: first "
            f"{', '.join(map(str, repeated[0]))}"
        )


def _uneven(table: pa.Table, layout: Layout) -> Iterator[str]:
    sizes = Counter(_groups(table, layout).values_counted())
    if len(sizes) > 1:
        said = ", ".join(f"{number} with {size}" for size, number in sorted(sizes.items()))
        yield f"not every prompt has as many rows: {said}"


def _ties(table: pa.Table, layout: Layout) -> Iterator[str]:
    groups = _groups(table, layout).rows
    assert layout.ranked_by is not None
    values: list[Any] = table.column(layout.ranked_by).to_pylist()
    tied = 0
    for rows in groups.values():
        inside = sorted((values[row] for row in rows if values[row] is not None), reverse=True)
        tied += len(inside) > 1 and (inside[0] == inside[1] or inside[-1] == inside[-2])
    if tied:
        yield (
            f"in {tied} of {len(groups)} groups of {' and '.join(layout.group)} the best or the worst "
            f"{layout.ranked_by} is shared by two rows"
        )


@dataclass(frozen=True)
class _Groups:
    rows: dict[tuple[Any, ...], list[int]]

    def values_counted(self) -> list[int]:
        return [len(rows) for rows in self.rows.values()]


def _groups(table: pa.Table, layout: Layout) -> _Groups:
    found: dict[tuple[Any, ...], list[int]] = {}
    keys = zip(*(table.column(name).to_pylist() for name in layout.group), strict=True)
    for row, key in enumerate(keys):
        found.setdefault(key, []).append(row)
    return _Groups(found)


def _unsure(table: pa.Table) -> Iterator[str]:
    """Generated pairs whose margin is not told from 0, or is none."""
    columns = (table.column(n).to_pylist() for n in ("source", "margin", "margin_standard_error"))
    generated = [(m, e) for source, m, e in zip(*columns, strict=True) if source == "generated"]
    unsure = sum(m is not None and bool(e) and abs(m) < SURE * e for m, e in generated)
    if unsure:
        yield (
            f"{unsure} of {len(generated)} generated pairs have a margin within {SURE:.0f} standard errors of 0"
        )
    negative = sum(m is not None and m <= 0 for m, _ in generated)
    if negative:
        yield f"{negative} of {len(generated)} generated pairs have no margin above 0"
