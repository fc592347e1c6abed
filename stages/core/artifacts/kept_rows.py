"""Rows of a table in the making that outlive the process which made them, so that the next goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.core.artifacts.files import replacing
from stages.core.artifacts.provenance import provenance
from stages.core.artifacts.schemas import Schema
from stages.core.artifacts.tables import fitting, writing_table
from stages.core.execution.runtime import log

KEEP_SECONDS = 30.0
"""Batches are kept this often: what `kill -9` loses at most."""

Batch = Sequence[Mapping[str, Any]]
"""The rows that are made at once."""


class KeptRows:
    """A hidden folder beside the table to come: `.<its name>.kept/<what makes it>/<batches>.parquet`.

    What makes it are stage, arguments, code and inputs: rows of anything else are thrown away.
    """

    def __init__(self, path: Path, schema: Schema, made_by: dict[str, str]) -> None:
        self._path, self._schema, self._made_by = path, schema, made_by
        key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
        self._all = path.with_name(f".{path.name}.kept")
        self._folder = self._all / key
        self.num_batches = 0
        """Those that are kept."""

    def read(self) -> Iterator[pa.Table]:
        """What an earlier process kept, in its order; whatever does not fit is removed."""
        if self._all.is_dir():
            for other in self._all.iterdir():
                if other != self._folder:
                    shutil.rmtree(other, ignore_errors=True)
        for file in sorted(self._folder.glob("*.parquet")):
            first, _, stop = file.stem.partition("-")
            if int(first) != self.num_batches:
                file.unlink()
                continue
            try:
                table = pq.read_table(file, page_checksum_verification=True)
                table = fitting(table, self._path, self._schema, self._made_by)
            except (OSError, ValueError):  # a power cut; it is made again
                file.unlink()
                continue
            self.num_batches = int(stop)
            yield table

    def add(self, batches: Sequence[Batch]) -> None:
        """Keep the batches that come next."""
        if not batches:
            return
        rows = [row for batch in batches for row in batch]
        table = fitting(rows, self._path, self._schema, self._made_by)
        stop = self.num_batches + len(batches)
        with replacing(self._folder / f"{self.num_batches:06d}-{stop:06d}.parquet") as part:
            pq.write_table(table, part, compression="zstd", write_page_checksum=True)
        self.num_batches = stop

    def remove(self) -> None:
        """Throw all away: the table is there."""
        shutil.rmtree(self._all, ignore_errors=True)


def write_batches(
    path: Path,
    batches: Callable[[int], Iterator[Batch]],
    schema: Schema,
    *,
    stage: str,
    arguments: object,
    inputs: Sequence[Path] = (),
) -> int:
    """As `write_rows`, of rows that are made batch by batch; how many there were.

    `batches(n)` gives all but the first n, which an earlier process has made and kept. However this
    one ends, save by `kill -9`, its finished batches are kept; the table is that of an unbroken run.
    """
    kept = KeptRows(path, schema, provenance(stage, arguments, inputs))
    with writing_table(path, schema, stage=stage, arguments=arguments, inputs=inputs) as writer:
        for table in kept.read():
            for place in range(len(table)):  # one by one, so that row groups end where they would
                writer.write(table.slice(place, 1))
        if kept.num_batches:
            log.info("%s: %d batches are done and kept; going on", stage, kept.num_batches)
        waiting: list[Batch] = []
        last = time.monotonic()
        try:
            for batch in batches(kept.num_batches):
                for row in batch:
                    writer.write([row])
                waiting.append(batch)
                if time.monotonic() - last >= KEEP_SECONDS:
                    kept.add(waiting)
                    waiting, last = [], time.monotonic()
        except BaseException:
            with suppress(Exception):
                kept.add(waiting)
            raise
        num_rows = writer.num_rows
    kept.remove()
    return num_rows
