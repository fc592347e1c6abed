"""Parquet files and Arrow streams that anybody may have made: pyarrow's errors, with the file's name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from stages.core.errors import UserError


@contextmanager
def naming(
    path: Path, kind: str = "Parquet file", error_type: type[UserError] = UserError
) -> Iterator[None]:
    """While a file is opened, read, and turned into Python's values: UserError names it.

    Damaged pages, text that is not UTF-8, times that Python has no word for, columns of one name.
    """
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        raise error_type(f"{path} is no readable {kind}: {error}") from error
