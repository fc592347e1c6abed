"""Layouts without a table: folders `win/` and `lose/`, and files `name_w.png` beside `name_l.png`.

The prompt of a pair is the text file of its name (`name.txt`, in the folder or in one of the two), or
stands in `prompts.csv`, `.tsv`, `.json` or `.jsonl` with the columns `name` and `prompt`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path

from stages.core.data.layouts.labels import (
    Cell,
    FoundImage,
    Key,
    Label,
    Layout,
    Ledger,
    check_prompt,
    digest_of,
)
from stages.core.data.layouts.sources import IMAGE_SUFFIXES, read_file
from stages.core.data.text_files import RECORD_SUFFIXES, read_lines, read_records
from stages.core.errors import UserError

Sides = dict[str, list[str]]
"""Paths in the folder of one pair's images, by 'w' and 'l'."""


class FolderLayout(Layout):
    """Image files of a folder."""

    def images(self, file: Path, cells: Collection[Cell]) -> Iterator[FoundImage]:
        """The images."""
        yield from _images(file, cells)


class WinLose(FolderLayout):
    """Images of one name in the folders `win` and `lose`."""

    name = "folders"

    def labels(self, ledger: Ledger) -> Iterator[Label]:
        """A label for each name."""
        for folder in self.files:
            names: dict[str, Sides] = defaultdict(lambda: {"w": [], "l": []})
            for side, part in (("w", "win"), ("l", "lose")):
                for image in images_in(folder / part):
                    names[image.stem][side].append(f"{part}/{image.name}")
            yield from _labels(folder, names, ledger)


class Suffixes(FolderLayout):
    """Images `name_w` (the winner) and `name_l` (the loser) in one folder."""

    name = "suffixes"

    def labels(self, ledger: Ledger) -> Iterator[Label]:
        """A label for each name."""
        for folder in self.files:
            names: dict[str, Sides] = defaultdict(lambda: {"w": [], "l": []})
            for image in images_in(folder):
                name, _, side = image.stem.rpartition("_")
                if side in ("w", "l"):
                    names[name][side].append(image.name)
            yield from _labels(folder, names, ledger)


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder, by name."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def _labels(folder: Path, names: dict[str, Sides], ledger: Ledger) -> Iterator[Label]:
    prompts = _prompts(folder)
    for row, name in enumerate(sorted(names)):
        ledger.counts["rows_read"] += 1
        sides = names[name]
        problem = _problem(sides)
        prompt = prompts.get(name) or _sidecar(folder, name)
        if problem is None and prompt is None:
            problem = f"no prompt; write it to {name}.txt, or to a file prompts.csv"
        problem = problem or check_prompt(prompt)
        if problem is not None or prompt is None:
            ledger.note_bad(folder, row, f"{name!r}: {problem}")
            continue
        winner, loser = sides["w"][0], sides["l"][0]
        key = Key(True, 0, digest_of(winner, loser))
        yield Label(folder, row, prompt, Cell(row, winner), Cell(row, loser), key)


def _problem(sides: Sides) -> str | None:
    for side, what in (("w", "winner"), ("l", "loser")):
        if not sides[side]:
            other = sides["l" if side == "w" else "w"][0]
            return f"{other} has no {what} beside it"
        if len(sides[side]) > 1:
            return f"there are {len(sides[side])} images of one {what}: {', '.join(sides[side])}"
    return None


def _prompts(folder: Path) -> dict[str, str]:
    """What a file of prompts in the folder says of each name."""
    found = [
        path for path in (folder / f"prompts{kind}" for kind in RECORD_SUFFIXES) if path.is_file()
    ]
    prompts: dict[str, str] = {}
    for path in found:
        for row, record in enumerate(read_records(path)):
            name, prompt = record.get("name"), record.get("prompt")
            if not isinstance(name, str) or not isinstance(prompt, str):
                raise UserError(f"{path}, row {row}: expected the columns 'name' and 'prompt'")
            prompts[name] = prompt
    return prompts


def _sidecar(folder: Path, name: str) -> str | None:
    for place in (folder, folder / "win", folder / "lose"):
        path = place / f"{name}.txt"
        if path.is_file():
            if not path.resolve().is_relative_to(folder.resolve()):
                raise UserError(f"{path} is a link that leaves the data folder {folder}")
            return " ".join(line.strip() for line in read_lines(path)).strip()
    return None


def _images(folder: Path, cells: Collection[Cell]) -> Iterator[FoundImage]:
    for cell in sorted(cells):
        data, problem = read_file(folder, cell.column)
        yield FoundImage(folder, cell, data, None, problem)
