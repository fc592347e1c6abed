"""Single cells of a run's tables, read from the row group that holds them: images by reference."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.core.artifacts.arrow_files import naming
from stages.core.artifacts.provenance import ArtifactError

KEPT_BYTES = 2**27
"""So many bytes of what was read last stay in memory."""


class NoSuchCellError(LookupError):
    """A table, row or column that the run does not have."""


def signature(path: Path) -> tuple[int, int] | None:
    """What tells a file from the one that stood there before; None where there is none."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_size


class Cells:
    """The tables of a run; each is opened once, and again when it has been made anew."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._tables: dict[str, _Table] = {}
        self._kept: OrderedDict[tuple[_Table, int, str], pa.ChunkedArray] = OrderedDict()
        self._turn = threading.Lock()

    def read(self, table: str, row: int, column: str) -> Any:
        """A cell; `column` may be of a struct, as `image.bytes`.

        NoSuchCellError if the run has none there, ArtifactError if the file is damaged.
        """
        path = self._run / table
        if ".." in Path(table).parts or Path(table).is_absolute() or path.suffix != ".parquet":
            raise NoSuchCellError(table)
        now = signature(path)
        if now is None:
            raise NoSuchCellError(table)
        with self._turn, _reading(path):
            opened = self._tables.get(table)
            if opened is None or opened.signature != now:
                opened = self._tables[table] = _Table(path, now)
            group, place = opened.find(row, column)
            cell = self._column(opened, group, column)[place].as_py()
        _, _, inner = column.partition(".")
        return cell[inner] if inner and cell is not None else cell

    def _column(self, table: _Table, group: int, column: str) -> pa.ChunkedArray:
        """A column of a row group, kept until others have been read for long."""
        key = (table, group, column)
        if key not in self._kept:
            self._kept[key] = table.file.read_row_group(group, columns=[column]).column(0)
            size = sum(array.nbytes for array in self._kept.values())
            while len(self._kept) > 1 and size > KEPT_BYTES:
                size -= self._kept.popitem(last=False)[1].nbytes
        self._kept.move_to_end(key)
        return self._kept[key]


class _Table:
    """One open file."""

    def __init__(self, path: Path, made: tuple[int, int]) -> None:
        self.signature = made
        self.file = pq.ParquetFile(path, page_checksum_verification=True)
        metadata = self.file.metadata
        counts = (metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
        self._starts = list(accumulate(counts, initial=0))

    def find(self, row: int, column: str) -> tuple[int, int]:
        """The row group that has a row, and where in it; NoSuchCellError if there is none."""
        first, _, inner = column.partition(".")
        schema = self.file.schema_arrow
        if not 0 <= row < self._starts[-1] or first not in schema.names:
            raise NoSuchCellError(column)
        if inner and schema.field(first).type.get_field_index(inner) < 0:
            raise NoSuchCellError(column)
        group = bisect_right(self._starts, row) - 1
        return group, row - self._starts[group]


def _reading(path: Path) -> Any:
    return naming(
        path, "table, it may be damaged: delete it and call snakemake again", ArtifactError
    )
