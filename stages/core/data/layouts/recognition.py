"""The layouts of human labels that can be imported, and how one is recognised.

docs/own-labels.md has an example of each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Literal

from stages.core.data.layouts.columns import UNNAMED, Columns, find_column, find_sides
from stages.core.data.layouts.folders import Suffixes, WinLose, is_suffixes, is_win_lose
from stages.core.data.layouts.groups import (
    DISLIKED,
    IMAGE,
    KTO,
    LIKED,
    RANK,
    Likes,
    Rankings,
    are_likes,
    list_column,
    list_judgement,
    not_ranked,
)
from stages.core.data.layouts.label_studio import LabelStudio
from stages.core.data.layouts.labels import Layout
from stages.core.data.layouts.rows import (
    CHOSEN,
    NAME_THEM,
    REJECTED,
    Comparisons,
    Pairs,
    Pickapic,
    known_judge,
)
from stages.core.data.layouts.sources import NOT_LABELS, SUFFIXES, columns_of
from stages.core.data.text_files import SHEET_HINT, SPREADSHEETS, kind_of
from stages.core.errors import UserError

LayoutName = Literal[
    "auto",
    "pickapic",
    "pairs",
    "comparisons",
    "rankings",
    "likes",
    "labelstudio",
    "folders",
    "suffixes",
]
LAYOUTS: dict[str, type[Layout]] = {
    layout.name: layout
    for layout in (Pickapic, Pairs, Comparisons, Rankings, Likes, LabelStudio, WinLose, Suffixes)
}
SPLIT = re.compile(r"^(.+?)-\d{5}-of-\d{5}")
SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval")
"""What a file, or the folder it is in, is called where it is a split of a dataset."""


def find_layout(
    names: Sequence[Path],
    layout: LayoutName = "auto",
    columns: Columns = UNNAMED,
    root: Path | None = None,
) -> Layout:
    """The labels in some files, folders or patterns, as one layout.

    UserError if there are none, or if they are not of one layout that we know.
    """
    files = tuple(find_files(names))
    if root is not None and not root.is_dir():
        raise UserError(f"preferences.root {root} is no folder; it names where the images lie")
    if mapped := columns.layout:
        if layout not in ("auto", mapped):
            raise UserError(
                f"preferences.layout is {layout!r}, and preferences.columns names columns of the layout "
                f"{mapped!r}; leave one of them out"
            )
        return LAYOUTS[mapped](files, columns, root, is_named=layout != "auto")
    if layout != "auto":
        return LAYOUTS[layout](files, columns, root, is_named=True)
    found: dict[str, Path] = {}
    for file in files:
        found.setdefault(recognise(file), file)
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise UserError(
            f"{first} has the layout {one!r} and {second} the layout {other!r}; import files of "
            "one layout at a time, or name it with preferences.layout"
        )
    return LAYOUTS[next(iter(found))](files, columns, root)


def find_files(names: Sequence[Path]) -> list[Path]:
    """The files of labels (or the folders of images) that files, folders and patterns name.

    UserError if one names nothing, or if the files are of several splits of a dataset.
    """
    named = {name: list(_expand(name)) for name in names}
    files = list(dict.fromkeys(file for found in named.values() for file in found))
    splits = {match[1] for file in files if (match := SPLIT.match(file.name))}
    if not splits:
        # A file that is named by itself is wanted, whatever it is called.
        loose = [file for name, found in named.items() for file in found if file != name]
        splits = {split for file in loose if (split := _split_of(file, names))}
        example = f"the file or folder {min(splits)}" if splits else ""
    else:
        example = f"{files[0].parent}/{min(splits)}-*"
    if len(splits) > 1:
        raise UserError(
            f"{', '.join(map(str, names))}: these are files of the splits "
            f"{', '.join(sorted(splits))}; name one, as {example}"
        )
    return files


def _split_of(file: Path, names: Sequence[Path]) -> str | None:
    """The split that a file's name, or that of a folder below the named ones, says it is of."""
    stem = re.split(r"[-_.]", file.name.lower())[0]
    if stem in SPLITS:
        return stem
    above = [name if name.is_dir() else name.parent for name in names]
    inner = [
        part
        for folder in above
        if file.is_relative_to(folder)
        for part in file.relative_to(folder).parent.parts
    ]
    inner = inner or list(file.parent.parts[-1:])
    return next((part.lower() for part in reversed(inner) if part.lower() in SPLITS), None)


def recognise(file: Path) -> str:
    """The name of a file's (or folder's) layout. UserError if we know none like it."""
    if file.is_dir():
        return "folders" if is_win_lose(file) else "suffixes"
    names = columns_of(file)

    def has(*wanted: Sequence[str]) -> bool:
        return all(find_column(names, want) for want in wanted)

    if any(has([name]) for name in ("jpg_0", "jpg_1", "label_0", "label_1")):
        return "pickapic"
    if has(["data"], ["annotations"]):
        return "labelstudio"
    sides = find_sides(names)
    if sides and known_judge(names, sides):
        return "comparisons"
    if (has(CHOSEN) or has(REJECTED)) and not sides:
        return "pairs"
    if has(LIKED) and (has(DISLIKED) or has(IMAGE)):
        return "likes"
    if images := list_column(file, names):
        if list_judgement(names):
            return "rankings"
        raise UserError(f"{file}: {not_ranked(images, names)}")
    if has(IMAGE, RANK):
        return "rankings"
    label = find_column(names, KTO)
    if label and has(IMAGE) and not sides and are_likes(file, label):
        return "likes"
    shown = ", ".join(names) or "(none)"
    if sides:
        raise UserError(
            f"{file} has two images a row ({', '.join(sides)}), and no column that is known to say which "
            f"one is better (found: {shown}); {NAME_THEM}"
        )
    raise UserError(
        f"{file}: no layout has the columns {shown}. Expected a prompt with chosen and rejected, with two "
        "images and a winner, with images and ranks, with liked and disliked, or the Pick-a-Pic columns; "
        "docs/own-labels.md shows each, and how preferences.columns names columns of any other name"
    )


def _expand(name: Path) -> Iterator[Path]:
    if has_magic(str(name)) and not name.exists():
        matches = sorted(map(Path, glob(str(name), recursive=True)))
        if not matches:
            raise UserError(f"{name} matches no file; preferences.files must name files of labels")
        for match in matches:
            if match.is_dir():
                yield from [] if "**" in str(name) else _in_folder(match)
            else:
                yield match
    elif name.is_dir():
        yield from _in_folder(name)
    elif name.is_file():
        if kind_of(name) in SPREADSHEETS:
            raise UserError(f"{name}: {SHEET_HINT}")
        yield name
    else:
        raise UserError(f"{name} does not exist; preferences.files must name files or a folder")


def _in_folder(folder: Path) -> list[Path]:
    """A folder of images as it is, or the files of labels in it."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise UserError(f"{folder} holds the splits {', '.join(splits)}; name one of them")
    if is_win_lose(folder):
        return [folder]
    for suffixes in ((".parquet",), (".arrow",), (".tar",), SUFFIXES):
        found = sorted(
            path
            for path in folder.rglob("*")
            if kind_of(path) in suffixes
            and path.name not in NOT_LABELS
            and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        )
        if any(path.stem != "prompts" for path in found):
            return found
    if is_suffixes(folder):
        return [folder]
    sheets = sorted(path for path in folder.rglob("*") if kind_of(path) in SPREADSHEETS)
    if sheets:
        raise UserError(f"{sheets[0]}: {SHEET_HINT}")
    raise UserError(
        f"{folder} holds no labels; expected files {', '.join(SUFFIXES)}, folders win/ and lose/, "
        "or images name_w and name_l"
    )
