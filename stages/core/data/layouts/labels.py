"""What every layout of human labels comes down to: a prompt, the better image, the worse image."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from stages.core.data.layouts.columns import UNNAMED, Columns
from stages.core.data.layouts.sources import Folder, RowNumber
from stages.core.data.prompts import MAX_PROMPT_LETTERS, normalise
from stages.core.data.text_files import not_utf8
from stages.core.errors import UserError

MAX_SHOWN = 50
"""Bad rows that a message lists; import.json has all."""


class Cell(NamedTuple):
    """Where an image stands in its file (or its folder)."""

    row: int
    column: str
    """Name of the column; of a folder the image's path in it."""
    position: int = 0
    """Place in the list, where a cell holds several images."""


Place = tuple[Path, Cell]
"""Where an image stands: its file and its cell."""


class Key(NamedTuple):
    """Orders the labels of a prompt by what they are, not by where they stand."""

    is_unnumbered: bool
    number: int
    digest: int


@dataclass(frozen=True, slots=True)
class Label:
    """One usable judgement, before its images are read."""

    file: Path
    row: int
    prompt: str
    winner: Cell
    loser: Cell
    key: Key
    images: tuple[int, int]
    """What the winner and the loser are, in 64 bits each: by these two votes on one pair are told."""
    loser_file: Path | None = None
    """Where the loser stands; None is `file`, where the winner does."""
    may_be_held_out: bool = True
    """Whether chance alone chose to ask about its prompt, as far as the file says."""

    @property
    def name(self) -> str:
        """What the pair is called; the same wherever it stands. Not unique: labels may repeat."""
        if self.key.is_unnumbered:
            return f"human-preferences-{self.key.digest:016x}"
        return f"human-preferences-{self.key.number:06d}"

    @property
    def places(self) -> tuple[Place, Place]:
        """Where the winner and the loser stand."""
        return (self.file, self.winner), (self.loser_file or self.file, self.loser)

    @property
    def subject(self) -> Hashable:
        """What was judged: two labels of one subject are two votes."""
        return frozenset(self.images)

    @property
    def verdict(self) -> Hashable:
        """What was said of it."""
        return self.images[0]


@dataclass(frozen=True, slots=True)
class Like:
    """One image that was liked or disliked by itself, before it is read."""

    file: Path
    prompt: str
    cell: Cell
    is_liked: bool
    image: int
    """What the image is, in 64 bits: by it two votes on one image are told."""

    @property
    def row(self) -> int:
        """Its row in the file."""
        return self.cell.row

    @property
    def name(self) -> str:
        """What the label is called; the same wherever it stands. Not unique: an image may have two prompts."""
        return f"human-likes-{self.image:016x}"

    @property
    def key(self) -> tuple[int, bool]:
        """Orders the likes of a prompt by what they are, not by where they stand."""
        return self.image, not self.is_liked

    @property
    def places(self) -> tuple[Place]:
        """Where the image stands."""
        return ((self.file, self.cell),)

    @property
    def subject(self) -> Hashable:
        """What was judged: two labels of one subject are two votes."""
        return self.image

    @property
    def verdict(self) -> Hashable:
        """What was said of it."""
        return self.is_liked


AnyLabel = TypeVar("AnyLabel", Label, Like)


@dataclass(frozen=True, slots=True)
class FoundImage:
    """An image's bytes as they stand in a file, or why there are none."""

    file: Path
    cell: Cell
    data: bytes | None
    uid: str | None = None
    """The name its makers gave it; two images of one name are one image."""
    problem: str | None = None


@dataclass(frozen=True)
class Layout(ABC):
    """How some files hold labels: which columns or names say what."""

    files: tuple[Path, ...]
    columns: Columns = UNNAMED
    """The columns that the user names; of the others the known names are found."""
    root: Path | None = None
    """Where images lie that a file names by their paths; None is the folder of the file."""
    is_named: bool = False
    """Whether the user named the layout, and with it what an order of images means."""
    name: ClassVar[str]

    def folder_of(self, file: Path) -> Folder:
        """Where the images lie that a file names."""
        return Folder(self.root, is_root=True) if self.root else Folder(file.parent)

    @abstractmethod
    def labels(self, ledger: Ledger) -> Iterator[Label]:
        """The usable labels, without images; what is not usable goes into the ledger."""

    @abstractmethod
    def images(self, file: Path, cells: Collection[Cell]) -> Iterator[FoundImage]:
        """The images of some cells of a file, in the order of the file."""


@dataclass
class Ledger:
    """What was read and why some of it is not used. Stops at one bad row more than allowed."""

    allowed_bad: int
    counts: Counter[str] = field(default_factory=Counter)
    bad: list[dict[str, Any]] = field(default_factory=list)
    votes: Counter[str] = field(default_factory=Counter)
    """How many pairs were judged as often for the winner and against it: '2 to 1'."""
    not_read: list[str] = field(default_factory=list)
    """Files in a folder of images that are none, and that no layout reads."""
    _places: set[tuple[Path, int]] = field(default_factory=set)

    def note_bad(self, file: Path, row: int, reason: str, column: str = "") -> None:
        """Note a row that cannot be used, once. UserError if that is one too many."""
        if (file, row) in self._places:
            return
        self._places.add((file, row))
        where = f", column {column!r}" if column else ""
        at = f"column {column!r}: " if column else ""
        line = {"line": row.line} if isinstance(row, RowNumber) and row.line else {}
        self.bad.append({"file": str(file), "row": int(row), **line, "reason": f"{at}{reason}"})
        if self.allowed_bad == 0:
            raise UserError(f"{file}, row {row}{where}: {reason}")
        if len(self.bad) > self.allowed_bad:
            raise UserError(
                f"{len(self.bad)} rows cannot be used; preferences.skip_bad allows "
                f"{self.allowed_bad}:{self.reasons()}"
            )

    def left_out(self) -> str:
        """What was read and is not used, and why, for a message; nothing where all is used."""
        counts = {
            name: number for name, number in self.counts.items() if number and name != "rows_read"
        }
        counts |= {"files_not_read": len(self.not_read)} if self.not_read else {}
        said = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in counts.items())
        text = f" Of {self.counts['rows_read']} rows: {said}." if said else ""
        return text + (f" {len(self.bad)} rows cannot be used:{self.reasons()}" if self.bad else "")

    def reasons(self) -> str:
        """The bad rows, a line each; of many the first."""
        shown = [
            f"{bad['file']}, row {RowNumber.at(int(str(bad['row'])), bad.get('line'))}: {bad['reason']}"
            for bad in self.bad[:MAX_SHOWN]
        ]
        rest = len(self.bad) - len(shown)
        return "\n  - " + "\n  - ".join([*shown, *([f"and {rest} more"] if rest else [])])


def check_prompt(value: object) -> str | None:
    """What is wrong with a prompt; None if nothing is."""
    if not isinstance(value, str) or not normalise(value):
        found = "null" if value is None else "empty" if value == "" else f"{value!r}"
        return f"the caption is {found}; every pair needs its prompt. Fill it in or remove the row."
    if len(value) > MAX_PROMPT_LETTERS:
        return (
            f"the caption has {len(value):,} letters, expected at most {MAX_PROMPT_LETTERS:,}. "
            "Shorten it or remove the row."
        )
    problem = not_utf8(value)
    return problem and f"the caption is no text: {problem}"


def digest_of(*parts: object) -> int:
    """64 bits that name some texts, bytes or image cells."""
    state = blake2b(digest_size=8)
    for part in parts:
        data = _data(part)
        state.update(len(data).to_bytes(8, "big") + data)
    return int.from_bytes(state.digest(), "big")


def _data(part: object) -> bytes:
    if isinstance(part, bytes):
        return part
    if isinstance(part, Mapping):
        return _data(part.get("bytes") or part.get("path"))
    return json.dumps(part, default=str).encode()
