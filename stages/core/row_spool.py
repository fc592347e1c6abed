"""Rows with images on their way into another order: on disk, read back one at a time."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa

from stages.core.disk import writing


class RowSpool:
    """A nameless Arrow file beside the table to come; it vanishes with the process, however that ends.

    Images of a whole iteration do not fit into memory; first all rows are added, then they are read
    in any order.
    """

    def __init__(self, folder: Path) -> None:
        """DiskError if the disk is full or read-only, here and in `add`."""
        self._place = folder / "rows.spool"
        with writing(self._place):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(  # noqa: SIM115
                dir=folder, prefix=f".{self._place.name}."
            )
        self._writer: pa.ipc.RecordBatchFileWriter | None = None
        self._reader: pa.ipc.RecordBatchFileReader | None = None
        self._count = 0

    def __enter__(self) -> RowSpool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # a full disk's, of what is still to be written; nobody reads it
            self._file.close()

    def add(self, rows: pa.Table) -> range:
        """Keep rows, all with the same columns; their numbers."""
        rows = rows.replace_schema_metadata(None)
        with writing(self._place):
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
            with writing(self._place):
                if self._writer is not None:
                    self._writer.close()
                self._file.flush()
            self._reader = pa.ipc.open_file(self._file)
        [row] = self._reader.get_batch(number).to_pylist()
        return dict(row)
