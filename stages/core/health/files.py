"""Whether what a run has written is whole, undamaged, and made from what lies beside it now."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from stages.core.artifacts.provenance import ArtifactError, digest, policy_digest
from stages.core.artifacts.tables import read_metadata
from stages.core.health.findings import Finding

GB = 1e9
LOW_DISK = 10 * GB


def check_disk(folder: Path) -> Iterator[Finding]:
    """Free space where results go."""
    place = folder if folder.exists() else Path.cwd()
    free = shutil.disk_usage(place).free
    what = f"{free / GB:.1f} GB are free at {place}"
    if free < LOW_DISK:
        yield Finding(level="problem", what=what, remedy="python -m stages.preflight --help")
    else:
        yield Finding(level="ok", what=what)


def check_artifact(path: Path, folder: Path) -> Iterator[Finding]:
    """A table or a manifest: readable to its end, and made from inputs that are still the same.

    Paths among its inputs are relative to `folder`, where Snakemake runs.
    """
    try:
        if path.name == "manifest.json":
            policy_digest(path.parent)
            inputs: dict[str, str] = json.loads(path.read_text()).get("sail_inputs", {})
        else:
            for batch in pq.ParquetFile(path, page_checksum_verification=True).iter_batches():
                batch.validate()
            inputs = read_metadata(path).get("inputs", {})
    except (ArtifactError, pa.ArrowException, OSError) as error:
        yield Finding(level="problem", what=f"{path} is damaged: {error}", remedy=f"rm {path}")
        return
    for name, expected in inputs.items():
        source = folder / name
        if source.is_file() and digest(source) != expected:
            yield Finding(
                level="problem",
                what=f"{path} was made from another {name} than the one that is there",
                remedy=f"rm {path}",
            )


def check_policies(results: Path) -> Iterator[Finding]:
    """Policy folders with weights and no manifest: a training that has not ended."""
    for folder in sorted(results.glob("iter*/policy")):
        if any(folder.iterdir()) and not (folder / "manifest.json").is_file():
            yield Finding(
                level="note",
                what=f"{folder} is unfinished: snakemake makes it again, or continues its training",
                remedy="snakemake --cores all",
            )


def check_leftovers(results: Path) -> Iterator[Finding]:
    """Half-written files of processes that are gone."""
    for path in sorted(results.rglob(".*.part")):
        writer = path.name.split(".")[-2]
        if not (writer.isdecimal() and psutil.pid_exists(int(writer))):
            yield Finding(
                level="note", what=f"{path} was left half-written by a killed process",
                remedy=f"rm {path}",
            )  # fmt: skip


def artifacts(results: Path) -> list[Path]:
    """All tables and manifests of a run."""
    return sorted([*results.rglob("*.parquet"), *results.rglob("policy/manifest.json")])
