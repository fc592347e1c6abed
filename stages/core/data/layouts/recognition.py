"""The layouts of human labels that can be imported, and how one is recognised.

docs/own-labels.md has an example of each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Literal

from stages.core.data.layouts.folders import Suffixes, WinLose, images_in
from stages.core.data.layouts.groups import (
    DISLIKED,
    IMAGE,
    LIKED,
    RANK,
    Likes,
    Rankings,
    list_column,
)
from stages.core.data.layouts.labels import Layout
from stages.core.data.layouts.rows import CHOSEN, REJECTED, Pairs, Pickapic, find_column
from stages.core.data.layouts.sources import SUFFIXES, columns_of
from stages.core.errors import UserError

LayoutName = Literal["auto", "pickapic", "pairs", "rankings", "likes", "folders", "suffixes"]
LAYOUTS: dict[str, type[Layout]] = {
    layout.name: layout for layout in (Pickapic, Pairs, Rankings, Likes, WinLose, Suffixes)
}
SPLIT = re.compile(r"^(.+?)-\d{5}-of-\d{5}")
NOT_LABELS = ("manifest.json", "dataset_info.json", "dataset_infos.json", "state.json")


def find_layout(names: Sequence[Path], layout: LayoutName = "auto") -> Layout:
    """The labels in some files, folders or patterns, as one layout.

    UserError if there are none, or if they are not of one layout that we know.
    """
    files = tuple(find_files(names))
    if layout != "auto":
        return LAYOUTS[layout](files)
    found: dict[str, Path] = {}
    for file in files:
        found.setdefault(recognise(file), file)
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise UserError(
            f"{first} has the layout {one!r} and {second} the layout {other!r}; import files of "
            "one layout at a time, or name it with preferences.layout"
        )
    return LAYOUTS[next(iter(found))](files)


def find_files(names: Sequence[Path]) -> list[Path]:
    """The files of labels (or the folders of images) that files, folders and patterns name.

    UserError if one names nothing, or if the shards are of several splits of a dataset.
    """
    files = list(dict.fromkeys(file for name in names for file in _expand(name)))
    splits = {match[1] for file in files if (match := SPLIT.match(file.name))}
    if len(splits) > 1:
        raise UserError(
            f"{', '.join(map(str, names))}: these are files of the splits "
            f"{', '.join(sorted(splits))}; name one, as {files[0].parent}/{min(splits)}-*"
        )
    return files


def recognise(file: Path) -> str:
    """The name of a file's (or folder's) layout. UserError if we know none like it."""
    if file.is_dir():
        return "suffixes" if images_in(file) else "folders"
    names = columns_of(file)

    def has(*wanted: Sequence[str]) -> bool:
        return all(find_column(names, want) for want in wanted)

    if any(has([name]) for name in ("jpg_0", "jpg_1", "label_0", "label_1")):
        return "pickapic"
    if has(CHOSEN) or has(REJECTED):
        return "pairs"
    if has(LIKED) and (has(DISLIKED) or has(IMAGE)):
        return "likes"
    if list_column(file, names) or has(IMAGE, RANK):
        return "rankings"
    raise UserError(
        f"{file}: no layout has the columns {', '.join(names) or '(none)'}. Expected a prompt with "
        "chosen and rejected, with images and ranks, with liked and disliked, or the Pick-a-Pic "
        "columns; docs/own-labels.md shows each"
    )


def _expand(name: Path) -> Iterator[Path]:
    if has_magic(str(name)) and not name.exists():
        matches = sorted(map(Path, glob(str(name))))
        if not matches:
            raise UserError(f"{name} matches no file; preferences.files must name files of labels")
        for match in matches:
            yield from _in_folder(match) if match.is_dir() else [match]
    elif name.is_dir():
        yield from _in_folder(name)
    elif name.is_file():
        yield name
    else:
        raise UserError(f"{name} does not exist; preferences.files must name files or a folder")


def _in_folder(folder: Path) -> list[Path]:
    """A folder of images as it is, or the files of labels in it."""
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise UserError(f"{folder} holds the splits {', '.join(splits)}; name one of them")
    if (folder / "win").is_dir() or (folder / "lose").is_dir():
        return [folder]
    if any(image.stem.endswith(("_w", "_l")) for image in images_in(folder)):
        return [folder]
    for suffixes in ((".parquet",), (".arrow",), (".tar",), SUFFIXES):
        found = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix in suffixes
            and path.name not in NOT_LABELS
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        )
        if found:
            return found
    raise UserError(
        f"{folder} holds no labels; expected files {', '.join(SUFFIXES)}, folders win/ and lose/, "
        "or images name_w and name_l"
    )
