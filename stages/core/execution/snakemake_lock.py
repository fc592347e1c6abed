"""Snakemake's lock on the folder that it runs in: freed if the Snakemake that took it was killed.

And a lock of our own on each run. Snakemake removes all of its locks of a folder when any Snakemake there
ends, so that a third one could start beside the first and take its files away.
"""

from __future__ import annotations

import fcntl
import platform
from pathlib import Path
from typing import IO

from stages.core.errors import UserError
from stages.core.execution.locks import try_lock

HEADS = "heads"
"""Folder in .snakemake with a lock file for each host on which a Snakemake has run."""


def hold_run(folder: Path, run: str) -> IO[str] | None:
    """A file to keep open while this Snakemake makes the run. None on a file system without flock.

    UserError if another Snakemake makes it: of this host, and on a shared file system of any.
    """
    path = folder / ".snakemake" / "runs" / f"{run}.lock"
    try:
        file = try_lock(path)
    except OSError:
        return None
    if file is None:
        raise UserError(
            f"another snakemake, process {path.read_text().strip() or '?'}, makes the run {run!r} in this "
            "folder: wait for it or end it, or make another run beside it (--config run=another)"
        )
    return file


def free_stale_lock(folder: Path) -> tuple[IO[str] | None, int]:
    """(a file to keep open while this Snakemake lives, how many stale locks were removed).

    Snakemake's own locks are plain files, which a killed Snakemake leaves behind. So every Snakemake
    of the folder also holds a shared lock, which the kernel releases when it ends. If nobody holds
    one, the plain files are stale, and are removed. They stay if another host has run here too,
    because nobody can know whether its Snakemake lives. None on a file system without flock.
    """
    mine = lock_of_this_host(folder)
    removed = 0
    try:
        is_ours = has_run_here_only(folder)
        mine.parent.mkdir(parents=True, exist_ok=True)
        file = mine.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # another Snakemake is at work: its locks are not stale
        else:
            if is_ours:
                removed = _remove_locks(folder)
        fcntl.flock(file, fcntl.LOCK_SH)
    except OSError:
        return None, 0
    return file, removed


def has_run_here_only(folder: Path) -> bool:
    """Whether all Snakemakes of the folder have run on this host, at least one of them."""
    mine = lock_of_this_host(folder)
    return list(mine.parent.glob("*.lock")) == [mine]


def lock_of_this_host(folder: Path) -> Path:
    """The lock that this host's Snakemakes of the folder share."""
    return folder / ".snakemake" / HEADS / f"{platform.node()}.lock"


def _remove_locks(folder: Path) -> int:
    stale = [path for path in (folder / ".snakemake" / "locks").glob("*.lock") if path.is_file()]
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)
