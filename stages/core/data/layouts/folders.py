"""Layouts without a table: folders `win/` and `lose/`, and files `name_w.png` beside `name_l.png`.

The two sides may be called in any of the ways of `SIDES`, in whatever case. The prompt of a pair is the
text file of its name (`name.txt` or `name.caption`, in the folder or in one of the two, or beside each
image), or stands in `prompts.csv`, `.tsv`, `.json` or `.jsonl` with the columns `name` and `prompt`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path

from stages.core.artifacts.images import looks_like_image
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
from stages.core.data.layouts.sources import IMAGE_SUFFIXES, Folder, read_file
from stages.core.data.text_files import RECORD_SUFFIXES, read_lines, read_records
from stages.core.errors import UserError

Sides = dict[str, list[str]]
"""Paths in the folder of one pair's images, by 'w' and 'l'."""

SIDES = (
    ("win", "lose"),
    ("winner", "loser"),
    ("winners", "losers"),
    ("chosen", "rejected"),
    ("w", "l"),
)
"""What the better and the worse side are called."""
SIDE_OF = {name: side for names in SIDES for name, side in zip(names, "wl", strict=True)}
CAPTIONS = (".txt", ".caption")


class FolderLayout(Layout):
    """Image files of a folder."""

    def images(self, file: Path, cells: Collection[Cell]) -> Iterator[FoundImage]:
        """The images."""
        folder = Folder(file, is_root=self.root is not None)
        for cell in sorted(cells):
            data, problem = read_file(folder, cell.column)
            yield FoundImage(file, cell, data, None, problem)


class WinLose(FolderLayout):
    """Images of one name in the folders `win` and `lose`."""

    name = "folders"

    def labels(self, ledger: Ledger) -> Iterator[Label]:
        """A label for each name."""
        for folder in self.files:
            names: dict[str, Sides] = defaultdict(lambda: {"w": [], "l": []})
            for part, side in _parts(folder).items():
                for path in _files_below(folder / part):
                    image = path.relative_to(folder / part)
                    if is_image(path, ledger):
                        name = image.with_suffix("").as_posix()
                        names[name][side].append(f"{part}/{image.as_posix()}")
            yield from _labels(folder, names, ledger)


class Suffixes(FolderLayout):
    """Images `name_w` (the winner) and `name_l` (the loser) in one folder, or in those below it."""

    name = "suffixes"

    def labels(self, ledger: Ledger) -> Iterator[Label]:
        """A label for each name."""
        for folder in self.files:
            names: dict[str, Sides] = defaultdict(lambda: {"w": [], "l": []})
            for path in _files_below(folder):
                image = path.relative_to(folder)
                if is_image(path, ledger):
                    name, side = _side_of(image.stem)
                    if side is None:
                        _not_read(path, ledger)
                    else:
                        whole = image.with_name(name).as_posix()
                        names[whole][side].append(image.as_posix())
            yield from _labels(folder, names, ledger)


def is_win_lose(folder: Path) -> bool:
    """Whether a folder has one of the two folders of a pair's sides."""
    return bool(_parts(folder))


def is_suffixes(folder: Path) -> bool:
    """Whether a folder has images whose names end as a winner's or a loser's."""
    return any(
        _side_of(path.stem)[1] is not None
        for path in _files_below(folder) if path.suffix.lower() in IMAGE_SUFFIXES
    )  # fmt: skip


def is_image(path: Path, ledger: Ledger) -> bool:
    """Whether a file is an image, by its name or else by its first bytes; counts what is neither."""
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES or looks_like_image(path):
        return True
    if suffix not in (*CAPTIONS, *RECORD_SUFFIXES):
        _not_read(path, ledger)
    return False


def _not_read(path: Path, ledger: Ledger) -> None:
    ledger.not_read.append(str(path))


def _files_below(folder: Path) -> list[Path]:
    """All files of a folder, by name, but hidden ones, such as what macOS keeps beside a file."""
    return sorted(
        path for path in folder.rglob("*")
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )  # fmt: skip


def _parts(folder: Path) -> dict[str, str]:
    """The folders of the two sides by what they are called, with 'w' or 'l'."""
    found = {path.name: SIDE_OF[path.name.lower()] for path in sorted(folder.iterdir())
             if path.is_dir() and path.name.lower() in SIDE_OF}  # fmt: skip
    kinds = {tuple(names) for names in SIDES if any(part.lower() in names for part in found)}
    if len(kinds) > 1:
        raise UserError(
            f"{folder} holds the folders {', '.join(found)}; expected one for the better images and one "
            "for the worse ones"
        )
    return found


def _side_of(stem: str) -> tuple[str, str | None]:
    """(name of the pair, 'w' or 'l') by the end of an image's name; None if it says neither."""
    name, _, end = stem.rpartition("_")
    return name, SIDE_OF.get(end.lower()) if name else None


def _labels(folder: Path, names: dict[str, Sides], ledger: Ledger) -> Iterator[Label]:
    prompts = _prompts(folder)
    for row, name in enumerate(sorted(names)):
        ledger.counts["rows_read"] += 1
        sides = names[name]
        problem = _problem(sides)
        prompt = prompts.get(name)
        if prompt is None and problem is None:
            prompt, problem = _sidecar(folder, name, sides)
        if problem is None and prompt is None:
            problem = f"no prompt; write it to {name}.txt, or to a file prompts.csv"
        problem = problem or check_prompt(prompt)
        if problem is not None or prompt is None:
            ledger.note_bad(folder, row, f"{name!r}: {problem}")
            continue
        winner, loser = sides["w"][0], sides["l"][0]
        images = digest_of(winner), digest_of(loser)
        key = Key(True, 0, digest_of(winner, loser))
        yield Label(folder, row, prompt, Cell(row, winner), Cell(row, loser), key, images)


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


def _sidecar(folder: Path, name: str, sides: Sides) -> tuple[str | None, str | None]:
    """(prompt, problem) in the text files of a pair: of its name, or of each image's; they must agree."""
    stems = [folder / name, *(folder / part / name for part in _parts(folder))]
    stems += [(folder / image).with_suffix("") for images in sides.values() for image in images]
    texts: dict[str, Path] = {}
    for stem in dict.fromkeys(stems):
        for kind in CAPTIONS:
            path = stem.with_name(stem.name + kind)
            if path.is_file():
                if not path.resolve().is_relative_to(folder.resolve()):
                    raise UserError(f"{path} is a link that leaves the data folder {folder}")
                text = " ".join(line.strip() for line in read_lines(path)).strip()
                texts.setdefault(text, path)
    if len(texts) > 1:
        shown = ", ".join(str(path.relative_to(folder)) for path in texts.values())
        return None, f"its text files {shown} differ; the two images of a pair have one prompt"
    return next(iter(texts), None), None
