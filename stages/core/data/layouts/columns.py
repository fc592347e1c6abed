"""Which columns of a table say what: as the user names them, or as a known set of labels has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from stages.core.data.prompts import PROMPT_COLUMNS
from stages.core.errors import UserError

GROUPS = (
    "prompt_id", "group", "group_id", "session", "session_id", "ranking_id", "annotator",
    "annotator_id", "user_hash", "user_id", "worker_id", "rater", "rater_id", "labeller", "labeler",
)  # fmt: skip
"""Columns that say which images of a prompt were judged together, and by whom."""
HELD_OUT = ("may_be_held_out",)
"""A column that says no where somebody chose which pairs were asked about: they measure no judge."""
SIDES = (
    ("image_a", "image_b"), ("image_1", "image_2"), ("image1", "image2"), ("image_0", "image_1"),
    ("image0", "image1"), ("image_left", "image_right"), ("left_image", "right_image"),
    ("left", "right"), ("path1", "path2"), ("jpg_0", "jpg_1"),
)  # fmt: skip
"""Names of the columns of two images that were compared."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a table of labels, named by the user (preferences.columns)."""

    prompt: str | None = None
    """The text that the images were made from."""
    image_a: str | None = None
    """One of two images that were compared."""
    image_b: str | None = None
    """The other one."""
    winner: str | None = None
    """Names the better image: as its column is called, or by what that name ends in ('a', 'left', '1')."""
    winner_a: str | None = None
    """The value of `winner` that means image_a, where its values are other words or numbers."""
    winner_b: str | None = None
    """The value of `winner` that means image_b."""
    score_a: str | None = None
    """A score, or a number of votes, of image_a: the higher, the better."""
    score_b: str | None = None
    """The same of image_b."""
    probability_a: str | None = None
    """A soft label: how probable it is that image_a is the better one, 0 to 1."""
    tie_below: float = 0.0
    """Scores, or the probabilities of both, that differ by less are a tie."""
    chosen: str | None = None
    """The better image, or a list of such."""
    rejected: str | None = None
    """The worse image, or a list of such."""
    image: str | None = None
    """The image where each has a row of its own, or the list of a row's images."""
    rank: str | None = None
    """The rank of `image` (1 is best), or the list of ranks."""
    score: str | None = None
    """The score of `image` (the higher, the better), or the list of scores."""
    like: str | None = None
    """Whether `image` was liked: 1, true, yes or 0, false, no."""
    group: tuple[str, ...] = ()
    """Columns that say which images of a prompt were judged together: a session, an annotator."""
    uid_a: str | None = None
    """The name that its makers gave image_a; two images of one name are one image."""
    uid_b: str | None = None
    """The same of image_b."""

    @property
    def named(self) -> dict[str, str]:
        """The columns that are named, by their role."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        others = ("tie_below", "group", "winner_a", "winner_b")
        return {role: name for role, name in found.items() if name and role not in others}

    @property
    def layout(self) -> str | None:
        """The layout that the named columns are of; None if none is named. UserError if they are of none.

        Of each layout just one verdict may be named: which of two would count is nobody's guess.
        """
        named = self.named
        if not named:
            return None
        of_pair = {"image_a", "image_b"} <= named.keys()
        verdicts: list[str] = [role for role in ("winner", "probability_a") if role in named]
        verdicts += ["score_a, score_b"] if {"score_a", "score_b"} <= named.keys() else []
        judged = [role for role in ("rank", "score", "like") if role in named]
        if {"chosen", "rejected"} <= named.keys() and not of_pair and "image" not in named:
            return "pairs"
        if of_pair and len(verdicts) == 1 and "image" not in named and not judged:
            return "comparisons"
        if "image" in named and len(judged) == 1 and not of_pair and not verdicts:
            return "likes" if judged == ["like"] else "rankings"
        raise UserError(
            f"preferences.columns names {', '.join(named)}; expected chosen and rejected, or image_a and "
            "image_b with one of winner, probability_a, or score_a and score_b, or image with one of "
            "rank, score, like"
        )

    def check(self, file: Path, names: Sequence[str]) -> None:
        """UserError if a file lacks one of the named columns."""
        wanted = [*self.named.items(), *(("group", name) for name in self.group)]
        for role, name in wanted:
            if name not in names:
                raise UserError(
                    f"{file} has no column {name!r}, which preferences.columns.{role} names (found: "
                    f"{', '.join(names) or 'nothing'})"
                )


UNNAMED = Columns()
"""No column is named: those of known names are found."""


def find_column(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The first wanted name that there is, in whatever case."""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[want] for want in wanted if want in lower), None)


def need(file: Path, names: Sequence[str], wanted: Sequence[str]) -> str:
    """The first wanted column that there is. UserError if none is there."""
    found = find_column(names, wanted)
    if found is None:
        raise UserError(
            f"{file} has no column {' or '.join(map(repr, wanted[:1]))} (found: "
            f"{', '.join(names)}); docs/own-labels.md shows the columns of every layout, and how "
            "preferences.columns names others"
        )
    return found


def prompt_column(file: Path, names: Sequence[str], columns: Columns) -> str:
    """The column of the prompts. UserError if there is none."""
    return columns.prompt or need(file, names, PROMPT_COLUMNS)


def group_columns(names: Sequence[str], columns: Columns) -> list[str]:
    """The columns that say which images of a prompt belong together: the named ones, or all known ones."""
    if columns.group:
        return list(columns.group)
    return [name for name in names if name.lower() in GROUPS]


def find_sides(names: Sequence[str]) -> tuple[str, str] | None:
    """The columns of two images that were compared, if there are such."""
    for one, other in SIDES:
        found = find_column(names, [one]), find_column(names, [other])
        if found[0] and found[1]:
            return found[0], found[1]
    return None
