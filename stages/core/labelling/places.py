"""Where the images lie that are to be labelled: folders and tables, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.core.artifacts.images import looks_like_image
from stages.core.data.layouts.columns import find_column
from stages.core.data.layouts.groups import IMAGE
from stages.core.data.layouts.labels import check_prompt
from stages.core.data.layouts.sources import (
    IMAGE_SUFFIXES,
    NOT_LABELS,
    columns_of,
    read_rows,
)
from stages.core.data.prompts import PROMPT_COLUMNS, normalise, prompt_id
from stages.core.data.text_files import PROBLEM, RECORD_SUFFIXES, kind_of, read_lines
from stages.core.errors import UserError

TABLES = (".parquet", ".arrow", *RECORD_SUFFIXES)
"""Files with one row an image."""
CAPTIONS = (".txt", ".caption")
MAX_SHOWN = 10
"""Files that a message lists."""

LAYOUTS = (
    "expected a folder for each prompt with its images and prompt.txt, an image and a text of the same "
    "name, or a table (.parquet, .csv, .jsonl ...) with the columns prompt and image; "
    "docs/labelling.md shows each"
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where an image lies: a file of its own, or a cell of a table."""

    name: str
    """What it is called in the journal: the path below what was given, and a table's row."""
    file: Path
    row: int | None = None
    column: str = ""

    def __str__(self) -> str:
        if self.row is None:
            return str(self.file)
        return f"{self.file}, row {self.row}, column {self.column!r}"


@dataclass(frozen=True, slots=True)
class PromptImages:
    """A prompt and its images, in the order in which they lie there."""

    prompt: str
    places: tuple[Place, ...]

    @property
    def prompt_id(self) -> str:
        """What names the prompt."""
        return prompt_id(self.prompt)


def find_images(sources: Sequence[Path]) -> list[PromptImages]:
    """The prompts of some folders and tables, in their order, each with at least two images.

    UserError if there is none, and for a prompt or an image that cannot be used.
    """
    by_prompt: dict[str, tuple[str, list[Place]]] = {}
    named: dict[str, Place] = {}
    for source in sources:
        for prompt, place in _find(source):
            if named.setdefault(place.name, place) is not place:
                raise UserError(
                    f"{named[place.name]} and {place} are both called {place.name!r} below what --images "
                    "names. Name the folder above them, or label them one after the other, each with its own "
                    "--labels."
                )
            by_prompt.setdefault(normalise(prompt), (prompt, []))[1].append(place)
    found = [PromptImages(prompt, tuple(places)) for prompt, places in by_prompt.values()]
    enough = [prompt for prompt in found if len(prompt.places) > 1]
    if not enough:
        shown = ", ".join(map(str, sources))
        raise UserError(
            f"{shown}: each of the {len(found)} prompts has one image; a pair needs two of the same "
            "prompt. Make more images, or let --prompts and --base make them."
        )
    return enough


def _find(source: Path) -> Iterator[tuple[str, Place]]:
    if source.is_file():
        yield from _in_table(source, source.name)
    elif not source.is_dir():
        raise UserError(f"--images {source} does not exist; {LAYOUTS}")
    elif tables := sorted(path for path in source.iterdir() if _is_table(path)):
        for table in tables:
            yield from _in_table(table, table.name)
    else:
        yield from _in_folder(source)


def _is_table(path: Path) -> bool:
    return (
        path.is_file()
        and kind_of(path) in TABLES
        and path.name not in NOT_LABELS
        and not path.name.startswith(".")
    )


def _in_table(file: Path, name: str) -> Iterator[tuple[str, Place]]:
    """One image a row, as candidates, image folders' metadata.jsonl and CSV files have it."""
    if kind_of(file) not in TABLES:
        raise UserError(f"--images {file}: found {file.suffix!r}; {LAYOUTS}")
    names = columns_of(file)
    prompts, image = find_column(names, PROMPT_COLUMNS), find_column(names, IMAGE)
    if prompts is None or image is None:
        missing = "prompt" if prompts is None else "image"
        raise UserError(
            f"{file} has no column {missing!r} (found: {', '.join(names) or 'nothing'}); {LAYOUTS}"
        )
    is_empty = True
    for row, values in read_rows(file, [prompts], with_images=False):
        is_empty = False
        problem = values.get(PROBLEM) or check_prompt(values.get(prompts))
        if problem:
            raise UserError(f"{file}, row {row}: {problem}")
        yield values[prompts], Place(f"{name}#{int(row)}", file, int(row), image)
    if is_empty:
        raise UserError(f"{file} has no rows; {LAYOUTS}")


def _in_folder(folder: Path) -> Iterator[tuple[str, Place]]:
    """Images with a text of the same name beside them, or with the prompt.txt of their folder."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        found = f"{len(files)} other files" if files else "nothing"
        raise UserError(f"--images {folder} holds no images (found {found}); {LAYOUTS}")
    texts = {path: _text_of(path) for path in images}
    if lonely := [path for path, text in texts.items() if text is None]:
        raise UserError(f"{_listed(lonely)} without a prompt in {folder}; {LAYOUTS}")
    if unreadable := [path for path in images if not looks_like_image(path)]:
        raise UserError(
            f"{_listed(unreadable)} that cannot be read as such in {folder}. Repair or remove them."
        )
    prompts: dict[Path, str] = {}
    for path, text in texts.items():
        if text is not None:
            if text not in prompts:
                prompts[text] = _prompt_in(text)
            yield prompts[text], Place(path.relative_to(folder).as_posix(), path)


def _text_of(image: Path) -> Path | None:
    beside = [image.with_suffix(ending) for ending in CAPTIONS]
    return next((path for path in [*beside, image.parent / "prompt.txt"] if path.is_file()), None)


def _prompt_in(file: Path) -> str:
    prompt = "\n".join(read_lines(file)).strip()
    if problem := check_prompt(prompt):
        raise UserError(f"{file}: {problem}")
    return prompt


def _listed(paths: Sequence[Path]) -> str:
    shown = "".join(f"\n  - {path}" for path in paths[:MAX_SHOWN])
    more = f"\n  - and {len(paths) - MAX_SHOWN} more" if len(paths) > MAX_SHOWN else ""
    return f"{len(paths)} images:{shown}{more}\nare files"
