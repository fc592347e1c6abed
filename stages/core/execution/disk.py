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


WORDY = ("pyarrow", "safetensors")
"""Libraries whose errors hold the system's message, but not its number."""

ROOM = 10**5
"""Bytes that Snakemake needs for its log, locks and records before the first job."""


class DiskError(UserError):
    """A file that could not be written; the message says why and what to do.

    `filename` and `errno` are those of an OSError, so that a folder which is being written can tell
    a file of its own.
    """

    def __init__(
        self, message: str, filename: Path | None = None, number: int | None = None
    ) -> None:
        super().__init__(message)
        self.filename, self.errno = filename, number


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within the block `path` is written; DiskError if the disk prevents that.

    An error about another file, for example one that is read meanwhile, is not changed.
    """
    try:
        yield
    except Exception as error:
        number = _number(error, path)
        if number is None:
            raise
        raise DiskError(
            f"{path} could not be written: {REMEDIES[number]}{_free(path, number)}. Then run the same "
            "command again: what is finished stays, and nothing half-written does.",
            path,
            number,
        ) from error


def refuse_unwritable(folders: list[Path]) -> None:
    """DiskError for a folder that cannot be written to, or that cannot be made."""
    for folder in folders:
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not os.access(place, os.W_OK | os.X_OK):
            read_only = bool(os.statvfs(place).f_flag & os.ST_RDONLY)
            number = errno.EROFS if read_only else errno.EACCES
            raise DiskError(f"{folder} cannot be written to: {REMEDIES[number]}.")


def refuse_full(folder: Path) -> None:
    """DiskError if there is no room even for Snakemake's own records: Snakemake shows a traceback."""
    free = shutil.disk_usage(folder).free
    if free < ROOM:
        raise DiskError(
            f"{folder.absolute()} is full: {free / 1e3:.0f} kB are free. Free some space, then run the "
            "same command again."
        )


def _number(error: BaseException | None, path: Path) -> int | None:
    """The system's error number if `error`, or an error that led to it, is about writing `path`."""
    is_told = False  # by a UserError, whose message is better than ours
    while error is not None:
        is_told = is_told or isinstance(error, UserError)
        filename, number = getattr(error, "filename", None), getattr(error, "errno", None)
        if isinstance(filename, str | bytes | os.PathLike):
            is_ours = _belongs(Path(os.fsdecode(filename)), path)
        else:
            is_ours, number = not is_told, number or _number_in_words(error)
        if is_ours and number in REMEDIES:
            return number
        error = error.__cause__ or error.__context__
    return None


def _belongs(file: Path, path: Path) -> bool:
    """Whether a file is `path`, lies in it, will be renamed to it, or is a folder above it."""
    file, path = file.absolute(), path.absolute()
    if path.parent.is_relative_to(file):
        return True
    if not file.is_relative_to(path.parent):
        return False
    name = file.relative_to(path.parent).parts[0]
    return name == path.name or name.startswith(f".{path.name}.")


def _number_in_words(error: BaseException) -> int | None:
    if type(error).__module__.partition(".")[0] not in WORDY:
        return None
    return next((number for number in REMEDIES if os.strerror(number) in str(error)), None)


def _free(path: Path, number: int) -> str:
    if number != errno.ENOSPC:
        return ""
    place = next(folder for folder in path.absolute().parents if folder.exists())
    return f" ({shutil.disk_usage(place).free / 1e6:.1f} MB are free at {path.parent})"
