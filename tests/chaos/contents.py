"""What two runs of one config must agree in, bit for bit."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow.parquet as pq

WALL_TIME = {"training.parquet": ["pairs_per_second"]}
"""The only columns left out: how fast a training was is no part of its result."""


def contents(results: Path) -> dict[str, str]:
    """A digest of every file of a run: of its bytes, or of its rows and metadata where time is in them.

    Nothing is left out: tables, weights, manifests, configs, exports, cards and the report.
    """
    files = sorted(path for path in results.rglob("*") if path.is_file())
    return {str(path.relative_to(results)): _digest(path) for path in files}


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """The files that are missing, unexpected or different."""
    return [
        *(f"{name} is missing" for name in sorted(expected.keys() - found.keys())),
        *(f"{name} should not be there" for name in sorted(found.keys() - expected.keys())),
        *(
            f"{name} differs"
            for name in sorted(expected.keys() & found.keys())
            if expected[name] != found[name]
        ),
    ]


def _digest(path: Path) -> str:
    if path.name not in WALL_TIME:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    table = pq.read_table(path).drop_columns(WALL_TIME[path.name])
    metadata = sorted((table.schema.metadata or {}).items())
    return hashlib.sha256(repr((metadata, table.to_pylist())).encode()).hexdigest()
