"""Nameless files for what does not fit into memory on its way into a table."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa

from stages.core.execution.disk import writing


class SpoolFile:
    """A nameless file beside the table to come; it vanishes with the process, however that ends.

    Closed at the end of a `with` block.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """DiskError, which calls it `name`, if the disk is full or cannot be written to."""
        self._path = folder / name
        with writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, prefix=f".{name}.")  # noqa: SIM115

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        with suppress(OSError):  # the disk is full; nobody reads what was still to be written
            self._file.close()


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
