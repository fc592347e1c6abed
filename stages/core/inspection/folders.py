"""What a folder holds: a policy, an export, or a run's tables; and JSON records."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stages.core.artifacts.arrow_files import naming
from stages.core.artifacts.provenance import ArtifactError, digest, is_inside
from stages.core.artifacts.tables import read_metadata
from stages.core.inspection.lineage import Lineage, flat, lineage_of

MANIFEST = "manifest.json"
NOT_FACTS = ("files",)


@dataclass(frozen=True, kw_only=True)
class Record:
    """A JSON record, with the files that it lists if it is a manifest."""

    path: Path
    facts: Mapping[str, Any]
    """Nested names joined by dots."""
    files: Sequence[str]
    """A line for each listed file: its name, size, and whether it is what the manifest lists."""
    lineage: Lineage | None
    warnings: Sequence[str]


def read_record(path: Path) -> Record:
    """What a JSON file of a run says. ArtifactError if it is none, or no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is no readable JSON file: {error}") from error
    if not isinstance(found, dict):
        raise ArtifactError(
            f"{path} holds {type(found).__name__}; expected a JSON object with names"
        )
    files = found.get("files")
    lines, warnings = [], []
    if path.name == MANIFEST:
        for line, warning in _listed(path.parent, files):
            lines.append(line)
            warnings += [warning] if warning else []
    lineage = lineage_of(found)
    if lineage is None:
        warnings.append("it records no stage that made it")
    facts = {
        key: value
        for key, value in found.items()
        if key not in NOT_FACTS and not key.startswith("sail_")
    }
    return Record(path=path, facts=flat(facts), files=lines, lineage=lineage, warnings=warnings)


def _listed(folder: Path, files: object) -> Iterator[tuple[str, str]]:
    """For each file that a manifest lists, a line, and a warning or nothing."""
    if not isinstance(files, dict) or not files:
        yield "", f"{folder / MANIFEST} lists no files"
        return
    for name, expected in files.items():
        if not is_inside(str(name)):
            yield "", f"it lists {name!r}, which lies outside of its folder"
            continue
        path = folder / name
        if not path.is_file():
            yield f"{name}: missing", f"{name} is listed and missing"
            continue
        is_same = digest(path) == expected
        line = f"{name}: {path.stat().st_size / 1e6:.2f} MB, sha256 {str(expected)[:12]}"
        yield line, "" if is_same else f"{name} is not what the manifest lists"


def list_tables(folder: Path) -> list[str]:
    """A line for each table in a folder: its path in it, rows, size, schema, stage."""
    lines = []
    for path in sorted(folder.rglob("*.parquet")):
        if path.name.startswith("."):
            continue
        with naming(path, error_type=ArtifactError):
            rows = pq.ParquetFile(path).metadata.num_rows
        made = read_metadata(path)
        lines.append(
            f"{path.relative_to(folder)}: {rows} rows, {path.stat().st_size / 1e6:.2f} MB, "
            f"{made.get('schema', 'of other making')}, by {made.get('stage', 'nobody known')}"
        )
    return lines
