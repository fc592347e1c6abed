"""Files that are written complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from psutil import pid_exists

from stages.core.execution.disk import writing


def write_text(path: Path, text: str) -> None:
    """Write a text file, complete or not at all."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write a JSON file, complete or not at all."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, default=str) + "\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; moved there when the block ends well, removed if not.

    DiskError if the disk is full or read-only.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        try:
            yield part
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def give_usual_modes(folder: Path) -> None:
    """Let others read the files below a folder as far as the umask does: safetensors writes them as 0600.

    Files of another name elsewhere keep the mode that they have there.
    """
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink() and file.stat().st_nlink == 1:
            file.chmod(0o666 & ~umask)


def remove_leftovers(path: Path) -> None:
    """Remove half-written files of killed processes, which were to be renamed to `path`."""
    for leftover in path.parent.glob(f".{escape(path.name)}.*.*"):
        writer, _, kind = leftover.name.removeprefix(f".{path.name}.").partition(".")
        if kind not in ("part", "old") or not writer.isdecimal():
            continue
        if int(writer) != os.getpid() and pid_exists(int(writer)):
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
