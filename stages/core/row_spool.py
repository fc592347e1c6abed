"""Rows with images on their way into another order: on disk, read back one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.core.disk import writing
from stages.core.spool_file import SpoolFile


class RowSpool(SpoolFile):
    """Rows, all of which are added first and then read in any order.

    Images of a whole iteration do not fit into memory. DiskError, which names rows.spool, if the
    disk does not take them either.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "rows.spool")
        self._writer: pa.ipc.RecordBatchFileWriter | None = None
        self._reader: pa.ipc.RecordBatchFileReader | None = None
        self._count = 0

    def __enter__(self) -> RowSpool:
        return self

    def add(self, rows: pa.Table) -> range:
        """Keep rows, all with the same columns; their numbers."""
        rows = rows.replace_schema_metadata(None)
        with writing(self._path):
            if self._writer is None:
                self._writer = pa.ipc.new_file(self._file, rows.schema)
            for row in range(len(rows)):
                self._writer.write_table(rows.slice(row, 1).combine_chunks())
            self._file.flush()
        first, self._count = self._count, self._count + len(rows)
        return range(first, self._count)

    def read(self, number: int) -> dict[str, Any]:
        """A row, by its number; nothing can be added after that."""
        if self._reader is None:
            with writing(self._path):
                if self._writer is not None:
                    self._writer.close()
                self._file.flush()
            self._reader = pa.ipc.open_file(self._file)
        [row] = self._reader.get_batch(number).to_pylist()
        return dict(row)
