"""What two runs of one config must agree in, bit for bit."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pyarrow.parquet as pq

WALL_TIME = {"training.parquet": ["pairs_per_second"]}
"""The only columns left out: how fast a training was is no part of its result."""
CLOCK = re.compile(rb"<(dt|dd) class=clock>.*?</\1>", re.DOTALL)
"""The only part of the report left out: when and how fast the run was made, by which commit."""


def contents(results: Path) -> dict[str, str]:
    """A digest of every file of a run: of its bytes, or of what is left of them without wall time.

    No file is left out: tables, weights, manifests, configs, exports, cards and the report.
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
    if path.name == "report.html":
        return hashlib.sha256(CLOCK.sub(b"", path.read_bytes())).hexdigest()
    if path.name not in WALL_TIME:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    table = pq.read_table(path).drop_columns(WALL_TIME[path.name])
    metadata = sorted((table.schema.metadata or {}).items())
    return hashlib.sha256(repr((metadata, table.to_pylist())).encode()).hexdigest()
