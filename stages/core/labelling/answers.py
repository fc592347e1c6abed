"""What people have answered: a choice between two images, or an order of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

from stages.core.errors import UserError
from stages.core.pages.journal import Entry, standing

Choice = Literal["left", "right", "tie", "both_bad", "skip"]
CHOICES: tuple[str, ...] = get_args(Choice)
"""Of two images."""
RANKED, ALL_BAD, SKIP = "ranked", "all_bad", "skip"
RANKING_CHOICES = (RANKED, ALL_BAD, SKIP)
"""Of several images."""


@dataclass(frozen=True, slots=True)
class Side:
    """An image as it was shown."""

    name: str
    digest: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What one person said of one pair, or of one set of images that they ranked."""

    labeller: str
    pair: str
    prompt: str
    shown: tuple[Side, ...]
    """The images in the order in which they stood there, the left one first."""
    choice: str
    at: datetime
    is_common: bool
    is_ranking: bool = False
    """Whether the images were to be ranked; two may be such a set too."""
    ranks: tuple[int, ...] = ()
    """Of `shown`, where they were ranked: 1 is best, images of one rank are equally good."""
    may_be_held_out: bool = True
    """Whether chance alone decided that this prompt was asked about."""

    @property
    def left(self) -> Side:
        """The image that stood left, or first."""
        return self.shown[0]

    @property
    def right(self) -> Side:
        """The image that stood right, or second."""
        return self.shown[1]

    @property
    def verdict(self) -> dict[str, int] | None:
        """The rank of each image by its name, 1 for the best; equal ones where all are bad.

        None where nothing was said.
        """
        two = {"left": (1, 2), "right": (2, 1), RANKED: self.ranks, SKIP: ()}
        ranks = two.get(self.choice, (1,) * len(self.shown))
        if not ranks:
            return None
        return {side.name: rank for side, rank in zip(self.shown, ranks, strict=True)}

    def to_entry(self) -> Entry:
        """The answer as the journal has it."""
        sides = [{"name": side.name, "digest": side.digest} for side in self.shown]
        images: Entry = (
            {"images": sides, "ranks": list(self.ranks)}
            if self.is_ranking
            else {"left": sides[0], "right": sides[1]}
        )
        return {
            "labeller": self.labeller,
            "pair": self.pair,
            "prompt": self.prompt,
            **images,
            "answer": self.choice,
            "at": self.at.isoformat(timespec="milliseconds"),
            "is_common": self.is_common,
            **({} if self.may_be_held_out else {"may_be_held_out": False}),
        }


def check_ranks(ranks: object, count: int) -> tuple[int, ...] | None:
    """The ranks of so many images; None if they are none: whole numbers from 1 on, none left out."""
    if not isinstance(ranks, list) or len(ranks) != count:
        return None
    if not all(type(rank) is int for rank in ranks) or set(ranks) != set(range(1, max(ranks) + 1)):
        return None
    return tuple(ranks)


def read_answers(path: Path, entries: Sequence[Entry]) -> dict[int, Answer]:
    """The answers of a journal that nobody took back, by number. UserError names a line that is none."""
    return {number: _answer(path, number, entry) for number, entry in standing(entries).items()}


def _answer(path: Path, number: int, entry: Mapping[str, Any]) -> Answer:
    try:
        is_ranking = "images" in entry
        sides = entry["images"] if is_ranking else [entry["left"], entry["right"]]
        choice, choices = entry["answer"], RANKING_CHOICES if is_ranking else CHOICES
        if choice not in choices:
            raise ValueError(f"answer {choice!r}; expected {', '.join(choices)}")
        ranks = check_ranks(entry["ranks"], len(sides)) if choice == RANKED else ()
        if ranks is None or len(sides) < 2:
            raise ValueError(f"ranks {entry.get('ranks')} of {len(sides)} images")
        return Answer(
            labeller=str(entry["labeller"]),
            pair=str(entry["pair"]),
            prompt=str(entry["prompt"]),
            shown=tuple(Side(str(side["name"]), str(side["digest"])) for side in sides),
            choice=choice,
            at=datetime.fromisoformat(entry["at"]),
            is_common=bool(entry["is_common"]),
            is_ranking=is_ranking,
            ranks=ranks,
            may_be_held_out=bool(entry.get("may_be_held_out", True)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}, line {number + 1} is no answer of the labelling page ({error!r}). Name the journal "
            "of another folder, or put this one back from a copy."
        ) from error
