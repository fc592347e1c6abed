"""File locks that the kernel releases with the process that holds them, however it ends."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)


def try_lock(path: Path, *, leave_name: bool = False, shared: bool = False) -> IO[str] | None:
    """The file, locked until it is closed; None if another process holds it.

    Several processes can hold it shared. The file then names this process, except with `leave_name`,
    for a process that only looks. OSError on a file system without flock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    if not leave_name:
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
    return file


@contextmanager
def held(path: Path, what: str, *, poll_seconds: float = 0.5) -> Iterator[None]:
    """Hold the lock within the block; while another process holds it, say so once and wait."""
    has_waited = False
    while (file := try_lock(path)) is None:
        if not has_waited:
            log.info(
                "waiting for process %s, which is at work in %s; end it if it should not be",
                path.read_text().strip() or "?", what,
            )  # fmt: skip
            has_waited = True
        time.sleep(poll_seconds)
    with file:
        yield
