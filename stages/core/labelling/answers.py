"""What people have answered, and what can be said of the answers: pace, agreement, favourite side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import krippendorff
import numpy as np

from stages.core.errors import UserError
from stages.core.evaluation.statistics import share_interval
from stages.core.pages.journal import Entry, standing

Choice = Literal["left", "right", "tie", "both_bad", "skip"]
CHOICES: tuple[str, ...] = get_args(Choice)

NUM_GAPS = 50
"""Answers that a pace is measured over."""
BREAK_SECONDS = 120.0
"""A longer time between two answers is a break, and counts for no pace."""
MIN_GAPS = 3
"""Fewer say nothing."""


@dataclass(frozen=True, slots=True)
class Side:
    """An image as it was shown."""

    name: str
    digest: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What one person said of one pair."""

    labeller: str
    pair: str
    prompt: str
    left: Side
    right: Side
    choice: str
    at: datetime
    is_common: bool

    @property
    def verdict(self) -> str | None:
        """The better image's name; 'tie' also where both are bad; None where the pair was skipped."""
        sides = {"left": self.left.name, "right": self.right.name, "skip": None}
        return sides.get(self.choice, "tie")

    def to_entry(self) -> Entry:
        """The answer as the journal has it."""
        return {
            "labeller": self.labeller,
            "pair": self.pair,
            "prompt": self.prompt,
            "left": {"name": self.left.name, "digest": self.left.digest},
            "right": {"name": self.right.name, "digest": self.right.digest},
            "answer": self.choice,
            "at": self.at.isoformat(timespec="milliseconds"),
            "is_common": self.is_common,
        }


def read_answers(path: Path, entries: Sequence[Entry]) -> dict[int, Answer]:
    """The answers of a journal that nobody took back, by number. UserError names a line that is none."""
    return {number: _answer(path, number, entry) for number, entry in standing(entries).items()}


def _answer(path: Path, number: int, entry: Mapping[str, Any]) -> Answer:
    try:
        choice = entry["answer"]
        if choice not in CHOICES:
            raise ValueError(f"answer {choice!r}; expected {', '.join(CHOICES)}")
        return Answer(
            labeller=str(entry["labeller"]),
            pair=str(entry["pair"]),
            prompt=str(entry["prompt"]),
            left=Side(str(entry["left"]["name"]), str(entry["left"]["digest"])),
            right=Side(str(entry["right"]["name"]), str(entry["right"]["digest"])),
            choice=choice,
            at=datetime.fromisoformat(entry["at"]),
            is_common=bool(entry["is_common"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}, line {number + 1} is no answer of the labelling page ({error!r}). Name the journal "
            "of another folder, or put this one back from a copy."
        ) from error


def seconds_per_pair(answers: Iterable[Answer]) -> float | None:
    """Mean time between two answers of one person's last ones, breaks left out; None of too few."""
    times = sorted(answer.at for answer in answers)[-NUM_GAPS - 1 :]
    gaps = [(later - earlier).total_seconds() for earlier, later in pairwise(times)]
    gaps = [gap for gap in gaps if gap <= BREAK_SECONDS]
    return float(np.mean(gaps)) if len(gaps) >= MIN_GAPS else None


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far people agree on the pairs that several of them judged."""

    num_pairs: int
    """Pairs that two or more have judged."""
    num_labellers: int
    """People who judged one of them."""
    raw: float | None
    """Share of equal verdicts among all pairs of verdicts on one pair; None without any."""
    alpha: float | None
    """Krippendorff's alpha: 1 is full agreement, 0 is chance; None where all verdicts are alike."""


def agreement(answers: Iterable[Answer]) -> Agreement:
    """Over left image, right image and tie (both bad is one); skipped pairs say nothing.

    Krippendorff, Content Analysis, Ch. 11, for nominal data with verdicts missing.
    """
    verdicts: dict[str, dict[str, int]] = defaultdict(dict)
    for answer in answers:
        if answer.verdict is not None:
            names = [*sorted((answer.left.name, answer.right.name)), "tie"]
            verdicts[answer.pair][answer.labeller] = names.index(answer.verdict)
    several = [by_labeller for by_labeller in verdicts.values() if len(by_labeller) > 1]
    labellers = sorted({labeller for by_labeller in several for labeller in by_labeller})
    equal = [one == other for group in several for one, other in combinations(group.values(), 2)]
    table = np.array(
        [[group.get(labeller, np.nan) for group in several] for labeller in labellers], np.float64
    )
    is_varied = len(np.unique(table[~np.isnan(table)])) > 1
    alpha = (
        float(krippendorff.alpha(reliability_data=table, level_of_measurement="nominal"))
        if is_varied
        else None
    )
    return Agreement(
        num_pairs=len(several),
        num_labellers=len(labellers),
        raw=float(np.mean(equal)) if equal else None,
        alpha=alpha,
    )


@dataclass(frozen=True)
class LeftShare:
    """How often the left one of two images was chosen; half is no favourite side."""

    num_choices: int
    share: float
    low: float
    high: float

    @property
    def is_biased(self) -> bool:
        """Whether the interval leaves out one half."""
        return not self.low <= 0.5 <= self.high


def left_share(answers: Iterable[Answer]) -> LeftShare | None:
    """Share of left choices among left and right ones, with its 95 % Wilson interval; None of none."""
    sides = [answer.choice for answer in answers if answer.choice in ("left", "right")]
    if not sides:
        return None
    num_left = sides.count("left")
    low, high = share_interval(num_left, len(sides))
    return LeftShare(len(sides), num_left / len(sides), low, high)
