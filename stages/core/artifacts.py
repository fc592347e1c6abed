"""Checked, atomic reading and writing of what the stages exchange: tables, JSON and policy folders."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.core.errors import UserError
from stages.core.fingerprint import code_version
from stages.core.schemas import Schema

ROW_GROUP_ROWS = 256

BASE = "base"
"""How flags name the untouched base model where a policy folder could stand."""


class ArtifactError(UserError):
    """An artifact that is missing or not what it should be; the message says what to do."""


def read_table(path: Path, schema: Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """The table at `path`, or some of its columns, checked against `schema`.

    ArtifactError names the file and the column that is missing, of another type, or null.
    """
    file = _open_parquet(path)
    wanted = [schema.arrow.field(name) for name in columns or schema.arrow.names]
    found = file.schema_arrow
    for field in wanted:
        if field.name not in found.names:
            raise ArtifactError(
                f"{path} has no column {field.name!r} (found: {', '.join(found.names)}); a "
                f"{schema.name} table needs it. Make the file anew with the stage that writes it."
            )
        if found.field(field.name).type != field.type:
            raise ArtifactError(
                f"{path}: column {field.name!r} is {found.field(field.name).type}, expected "
                f"{field.type}. Make the file anew with the stage that writes it."
            )
    table = file.read(columns=[field.name for field in wanted])
    for field in wanted:
        column = table.column(field.name)
        if not field.nullable and column.null_count:
            row = column.is_null().index(True).as_py()
            raise ArtifactError(f"{path}: column {field.name!r} is null in row {row}")
    return table


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
        key.decode().removeprefix("sail_"): _maybe_json(value.decode())
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
    layout = schema.with_metadata(provenance(stage, arguments, inputs))
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
    with replacing(path) as part:
        pq.write_table(table, part, compression="zstd", row_group_size=ROW_GROUP_ROWS)
    return table


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
    manifest = {"files": files, **facts, **provenance(stage, arguments, inputs)}
    path = folder / "manifest.json"
    write_json(path, {key: _maybe_json(value) for key, value in manifest.items()})
    return path


def policy_digest(folder: Path) -> str:
    """What names a policy's weights. ArtifactError unless the folder is complete and undamaged."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise ArtifactError(
            f"{folder} is no finished policy: it has no manifest.json. Run the stage that trains "
            "it to its end (snakemake continues an interrupted training)."
        )
    try:
        files: dict[str, str] = json.loads(path.read_text())["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} is no readable manifest ({error}). Delete it and run snakemake again."
        ) from error
    for name, expected in files.items():
        file = folder / name
        if not file.is_file() or digest(file) != expected:
            raise ArtifactError(
                f"{file} is missing or is not what manifest.json lists (expected sha256 "
                f"{expected[:12]}...). Delete {path} and run snakemake again."
            )
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


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
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; moved there when the block ends well, removed if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _open_parquet(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; run the stage that writes it first")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ArtifactError(f"{path} is no readable Parquet file: {error}") from error


def _maybe_json(value: Any) -> Any:
    # Only blocks and lists: a code version such as 12e3 would be read as a number.
    if not isinstance(value, str) or value[:1] not in ("{", "["):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
