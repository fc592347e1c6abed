"""Images to be labelled, by prompt: where each one lies, and its bytes when they are asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from threading import Lock

import numpy as np

from stages.core.artifacts.images import (
    ImageError,
    decode_image,
    encode_png,
    image_kind,
    looks_like_image,
)
from stages.core.data.image_spool import MIN_SIDE
from stages.core.data.layouts.columns import find_column
from stages.core.data.layouts.groups import IMAGE
from stages.core.data.layouts.labels import check_prompt
from stages.core.data.layouts.sources import (
    IMAGE_SUFFIXES,
    NOT_LABELS,
    Folder,
    columns_of,
    read_cell,
    read_rows,
)
from stages.core.data.prompts import PROMPT_COLUMNS, normalise, prompt_id
from stages.core.data.text_files import PROBLEM, RECORD_SUFFIXES, kind_of, read_lines
from stages.core.errors import UserError

TABLES = (".parquet", ".arrow", *RECORD_SUFFIXES)
"""Files with one row an image."""
CAPTIONS = (".txt", ".caption")
SHOWN = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp", "avif": "image/avif"}
"""Kinds that every browser shows as `decode_image` does; the others are sent as PNG."""
MAX_SHOWN = 10
"""Files that a message lists."""
NUM_KEPT = 64
"""Images that stay in memory after they were read."""

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
    for source in sources:
        for prompt, place in _find(source):
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


@dataclass(frozen=True, slots=True)
class Picture:
    """An image as it is shown."""

    digest: str
    """Names the bytes of its file."""
    data: bytes
    """What the browser is sent: those bytes, or a PNG of what they show."""
    media_type: str
    width: int
    height: int


class Gallery:
    """Reads images one by one, and keeps the last ones; of several threads one at a time."""

    def __init__(self, prompts: Sequence[PromptImages]) -> None:
        self.prompts = list(prompts)
        self.places = {place.name: place for prompt in prompts for place in prompt.places}
        self._kept: OrderedDict[Place, Picture] = OrderedDict()
        self._where: dict[str, Place] = {}
        self._turn = Lock()

    def picture(self, place: Place) -> Picture:
        """The image at a place. ImageError, which names it, if it cannot be read or is too small."""
        with self._turn:
            if place not in self._kept:
                self._kept[place] = _picture(place)
                self._where[self._kept[place].digest] = place
                if len(self._kept) > NUM_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(place)
            return self._kept[place]

    def find(self, digest: str) -> Picture | None:
        """The image of these bytes, if it was read before."""
        place = self._where.get(digest)
        return None if place is None else self.picture(place)

    def read(self, places: Collection[Place]) -> Iterator[tuple[Place, bytes | None]]:
        """The bytes of some images, file after file; None for one that is no longer there."""
        tables: dict[tuple[Path, str], dict[int, Place]] = {}
        for place in sorted(places, key=lambda place: place.name):
            if place.row is None:
                yield place, place.file.read_bytes() if place.file.is_file() else None
            else:
                tables.setdefault((place.file, place.column), {})[place.row] = place
        for (file, column), rows in tables.items():
            left = dict(rows)
            for row, values in read_rows(file, [column], with_images=True, only=rows):
                data, _problem = read_cell(values.get(column), Folder(file.parent))
                yield left.pop(int(row)), data
            yield from ((place, None) for place in left.values())

    def digests(self, names: Collection[str]) -> Mapping[str, str]:
        """What names the bytes of the images of some names, of those that are there."""
        wanted = {self.places[name] for name in names if name in self.places}
        return {place.name: digest_of_image(data) for place, data in self.read(wanted) if data}


def digest_of_image(data: bytes) -> str:
    """What names an image's bytes, 32 hex digits."""
    return blake2b(data, digest_size=16).hexdigest()


def _picture(place: Place) -> Picture:
    data = _bytes_of(place)
    image = decode_image(data, str(place))
    if min(image.size) < MIN_SIDE:
        raise ImageError(
            f"{place}: the image is {image.width} x {image.height} pixels; expected at least "
            f"{MIN_SIDE} x {MIN_SIDE}"
        )
    kind = image_kind(data, str(place))
    shown = data if kind in SHOWN else encode_png(np.asarray(image))
    media_type = SHOWN.get(kind, "image/png")
    return Picture(digest_of_image(data), shown, media_type, image.width, image.height)


def _bytes_of(place: Place) -> bytes:
    try:
        if place.row is None:
            return place.file.read_bytes()
        rows = read_rows(place.file, [place.column], with_images=True, only={place.row})
        values = next((values for _, values in rows), {})
    except OSError as error:
        raise ImageError(f"{place}: the image cannot be read: {error.strerror}") from error
    data, problem = read_cell(values.get(place.column), Folder(place.file.parent))
    if data is None:
        raise ImageError(f"{place}: {problem}")
    return data
