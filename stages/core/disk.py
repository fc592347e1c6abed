"""What a disk that is full or cannot be written to is called, and what to do about it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.core.errors import UserError

REMEDIES = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space or have it raised",
    errno.EROFS: "the file system is mounted read-only; mount it for writing, or run elsewhere",
    errno.EACCES: "this user may not write there; change the rights, or run elsewhere",
}


ROOM = 10**5
"""Bytes that Snakemake needs for its log, locks and records before the first job."""


class DiskError(UserError):
    """A file that could not be written; the message says why and what to do."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within the block `path` is written; DiskError if the disk is what hinders it."""
    try:
        yield
    except Exception as error:
        number = _number(error)
        if number is None:
            raise
        raise DiskError(
            f"{path} could not be written: {REMEDIES[number]}{_free(path, number)}. Then run the same "
            "command again: what is finished stays, and nothing half-written does."
        ) from error


def refuse_unwritable(folders: list[Path]) -> None:
    """DiskError for a folder in which, or in whose place, nothing can be written."""
    for folder in folders:
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not os.access(place, os.W_OK | os.X_OK):
            read_only = bool(os.statvfs(place).f_flag & os.ST_RDONLY)
            number = errno.EROFS if read_only else errno.EACCES
            raise DiskError(f"{folder} cannot be written to: {REMEDIES[number]}.")


def refuse_full(folder: Path) -> None:
    """DiskError if there is no room even for Snakemake's own records, which fails with a traceback."""
    free = shutil.disk_usage(folder).free
    if free < ROOM:
        raise DiskError(
            f"{folder.absolute()} is full: {free / 1e3:.0f} kB are free. Free some space, then run the "
            "same command again."
        )


def _number(error: BaseException | None) -> int | None:
    """The system's number of a disk's error, or of the one that led to it; libraries keep only words."""
    while error is not None:
        for number in REMEDIES:
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                return number
        error = error.__cause__ or error.__context__
    return None


def _free(path: Path, number: int) -> str:
    if number != errno.ENOSPC:
        return ""
    return f" ({shutil.disk_usage(path.parent).free / 1e6:.1f} MB are free at {path.parent})"
