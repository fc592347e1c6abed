"""Folders that other tools open: written beside and renamed, with a card and a manifest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from stages.core.artifacts.files import give_usual_modes, remove_leftovers, write_json, write_text
from stages.core.artifacts.provenance import digest, provenance
from stages.core.errors import UserError
from stages.core.execution.disk import writing
from stages.core.export.markdown import MARK

CARD = "README.md"
MANIFEST = "manifest.json"


@contextmanager
def export_folder(output: Path, *, is_ours: bool = False) -> Iterator[Path]:
    """A folder beside `output` to write to; takes its place when the block ends well.

    UserError if there is something at `output` that is no export of ours, unless the caller knows
    that it is; DiskError if the disk is full or read-only.
    """
    if not is_ours:
        check_replaceable(output)
    new, old = (output.with_name(f".{output.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output)
        new.mkdir()
        try:
            yield new
            give_usual_modes(new)
            if output.exists():
                output.replace(old)
            new.replace(output)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def check_replaceable(output: Path) -> None:
    """UserError unless `output` does not exist, is empty, or is an export of ours."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    card = output / CARD
    if card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace"):
        return
    found = "a file" if output.is_file() else "a folder that no export wrote"
    raise UserError(
        f"{output} exists already and is {found}; it is left as it is. Remove it, or name another "
        "--output."
    )


def finish_export(
    folder: Path, card: str, *, stage: str, arguments: object, inputs: Sequence[Path], facts: object
) -> None:
    """Add the card, and the manifest with the digests of all other files."""
    files = {
        str(file.relative_to(folder)): digest(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    write_text(folder / CARD, card)
    made_by = {
        name: json.loads(value) if value[:1] == "{" else value
        for name, value in provenance(stage, arguments, inputs).items()
    }
    write_json(folder / MANIFEST, {"files": files, "facts": facts, **made_by})


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under another name, where the file system can; else a copy of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
