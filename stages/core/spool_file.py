"""A nameless file for what does not fit into memory on its way into a table."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from stages.core.disk import writing


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
        with suppress(OSError):  # a full disk's, of what is still to be written; nobody reads it
            self._file.close()
