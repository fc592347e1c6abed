"""Who won, said in the many ways of tables: never guessed.

What cannot be read for certain is a `Bad` row, which names what was found and what was expected.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Literal

Verdict = Literal["a", "b", "tie", "none"]
"""The first image, the second, neither; 'none' where nobody has judged."""

YES, NO = ("1", "true", "yes", "like", "liked"), ("0", "false", "no", "dislike", "disliked")
TIES = (
    "tie", "ties", "equal", "draw", "both", "same", "neither", "none", "both_good", "both_bad",
    "bothbad", "tie (bothbad)", "tie (both bad)", "tie (both good)", "no_preference",
)  # fmt: skip
NOTHING = ("", "null", "nan", "n/a", "na", "skip", "skipped")


class Bad(Exception):
    """A row that cannot be used; the message says why."""


def is_no(value: object) -> bool:
    """Whether a cell says no: false in whatever case, 0, or a spreadsheet's FALSE."""
    return _word(value) in NO


def number(column: str, value: object, expected: str = "a number") -> float:
    """The number in a cell. Bad if there is none, or one that is not finite."""
    try:
        found = float("nan" if isinstance(value, bool) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise Bad(f"{column!r} is {value!r}; expected {expected}")
    return found


def is_missing(value: object) -> bool:
    """Whether a cell is empty or null."""
    return value is None or value != value or _word(value) in NOTHING


def like(column: str, value: object) -> bool:
    """Whether an image was liked. Bad for any other word."""
    word = _word(value)
    if word not in (*YES, *NO):
        raise Bad(f"{column!r} is {value!r}; expected 1 (liked) or 0 (disliked)")
    return word in YES


def by_scores(columns: tuple[str, str], values: tuple[object, object], tie_below: float) -> Verdict:
    """The image of the higher score. 'none' where both are missing; Bad where one is."""
    if all(map(is_missing, values)):
        return "none"
    one, other = (number(name, value) for name, value in zip(columns, values, strict=True))
    return _higher(one - other, tie_below)


def by_probability(column: str, value: object, tie_below: float) -> Verdict:
    """The image that is probably the better one. Bad outside [0, 1]."""
    if is_missing(value):
        return "none"
    first = number(column, value, "a probability from 0 to 1")
    if not 0 <= first <= 1:
        raise Bad(f"{column!r} is {value!r}; expected a probability from 0 to 1")
    return _higher(first - (1 - first), tie_below)


def by_name(column: str, value: object, names: dict[str, Verdict]) -> Verdict:
    """The image that a cell names; a list of names is a vote. Bad for a name that is no image's."""
    if isinstance(value, list):
        votes = Counter(by_name(column, one, names) for one in value)
        return _higher(float(votes["a"] - votes["b"]), 0.0) if votes["a"] + votes["b"] else (
            "tie" if votes["tie"] else "none")  # fmt: skip
    if is_missing(value):
        return "none"
    word = _word(value)
    if word in names:
        return names[word]
    if word in TIES:
        return "tie"
    expected = ", ".join(map(repr, names))
    raise Bad(
        f"{column!r} is {value!r}, which names neither image; expected one of {expected}, or 'tie'. "
        "preferences.columns.winner_a and winner_b name other values"
    )


def names_of(side_a: str, side_b: str) -> dict[str, Verdict]:
    """What names each of two images: their columns' names, and what is different at the names' ends.

    'image_a' and 'image_b' are also 'a' and 'b', 'model_a' and 'model_b'. Nothing that could be either.
    """
    found: dict[str, set[Verdict]] = {}
    parts = [re.findall(r"[^\W_\d]+|\d+", name.lower()) for name in (side_a, side_b)]
    sides: tuple[tuple[str, list[str], list[str], Verdict], ...] = (
        (side_a, parts[0], parts[1], "a"), (side_b, parts[1], parts[0], "b"),
    )  # fmt: skip
    for name, own, others, verdict in sides:
        different = [part for part in own if part not in others]
        words = {name.lower()}
        for part in different if len(different) == 1 else []:
            words |= {
                part,
                *(f"{kind}{mark}{part}" for kind in ("model", "image") for mark in ("_", " ", "")),
            }
        for word in words:
            found.setdefault(word, set()).add(verdict)
    return {word: next(iter(who)) for word, who in found.items() if len(who) == 1}


def _higher(difference: float, tie_below: float) -> Verdict:
    if difference == 0 or abs(difference) < tie_below:
        return "tie"
    return "a" if difference > 0 else "b"


def _word(value: object) -> str:
    """A cell as a word in small letters; whole numbers without a fraction, as pandas writes them."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", str(value).strip().lower())
