"""The pairs of a page: what each iteration made, what people said, and where the judge is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stages.core.evaluation.wording import DASH, number, significant
from stages.core.report.figures import histogram
from stages.core.report.looks import Look, Shown
from stages.core.report.panels import Panel
from stages.core.report.thumbnails import Thumbnail

Row = dict[str, Any]
Pictures = tuple[Thumbnail, Thumbnail]
"""The winner and the loser of a pair."""

MILLIONTHS = 1e6
"""Rewards are small: the page shows them in millionths of mean squared noise."""
NOISY = 2.0
"""A margin of fewer standard errors could be noise."""


def choose_shown(rows: Sequence[Row], num_shown: int) -> list[int]:
    """Places of pairs from the surest to the least sure, by margin over standard error.

    The last half are the least sure ones of all, for audit; the others are evenly spaced.
    """
    order = sorted(range(len(rows)), key=lambda place: -certainty(rows[place]))
    if len(order) <= num_shown:
        return order
    num_audit = num_for_audit(num_shown)
    rest, audit = order[: len(order) - num_audit], order[len(order) - num_audit :]
    return [rest[round(i)] for i in np.linspace(0, len(rest) - 1, num_shown - num_audit)] + audit


def num_for_audit(num_shown: int) -> int:
    """How many of so many pairs are for audit: half of them, at least one."""
    return max(1, num_shown // 2)


def certainty(row: Row) -> float:
    """Margin over its standard error; where there is none the margin, or the difference in score."""
    margin, error = row["margin"], row["margin_standard_error"]
    if margin is not None and error:
        return float(margin) / float(error)
    if margin is not None:
        return math.inf if error == 0 and margin > 0 else float(margin)
    if None in (row["winner_score"], row["loser_score"]):
        return 0.0
    return float(row["winner_score"] - row["loser_score"])


def pairs_view(rows: Sequence[Row], shown: Sequence[int], images: Sequence[Pictures]) -> Row:
    """One iteration's pairs: how many, their margins, and some of them with (winner, loser)."""
    iteration = rows[0]["iteration"]
    margins = np.array([row["margin"] for row in rows if row["margin"] is not None], np.float64)
    margins = margins[np.isfinite(margins)]
    audit = min(num_for_audit(len(shown)), len(shown))
    are_rewards = scores_are_rewards(rows)
    return {
        "iteration": iteration,
        "num_pairs": len(rows),
        "sentence": margins_sentence(rows),
        "histogram": Panel(
            "Margins",
            histogram(f"margins of iteration {iteration}", MILLIONTHS * margins),
            "Implicit reward of the winner minus that of the loser; dashed at 0.",
        )
        if len(margins)
        else None,
        "looks": [
            pair_look(
                rows[place],
                images[i],
                is_for_audit=i >= len(shown) - audit,
                are_rewards=are_rewards,
            )
            for i, place in enumerate(shown)
        ],
    }


def scores_are_rewards(rows: Sequence[Row]) -> bool:
    """Whether the pairs were ranked by the reward: their scores then differ by their margins."""
    known = [
        row for row in rows if None not in (row["margin"], row["winner_score"], row["loser_score"])
    ]
    return bool(known) and all(
        math.isclose(
            row["winner_score"] - row["loser_score"], row["margin"], rel_tol=1e-3, abs_tol=1e-6
        )
        for row in known
    )


def pair_look(row: Row, images: Pictures, *, is_for_audit: bool, are_rewards: bool) -> Look:
    """One generated pair as it is shown."""

    def score(value: float | None) -> str:
        return f"reward {millionths(value)}" if are_rewards else f"score {significant(value)}"

    ratio = certainty(row) if row["margin_standard_error"] else None
    notes = [
        f"margin {millionths(row['margin'])} ± {millionths(row['margin_standard_error'])} millionths"
        + (f", {number(ratio, 1)} standard errors" if ratio is not None else ""),
        f"p(winner > loser) {chance(row['probability'])}",
    ]
    return Look(
        prompt=row["prompt"],
        pictures=[
            Shown(label="winner", image=images[0], note=score(row["winner_score"])),
            Shown(label="loser", image=images[1], note=score(row["loser_score"])),
        ],
        notes=notes,
        mark="for audit" if is_for_audit else "",
        name=row["pair_id"],
    )


def chance(value: float | None) -> str:
    """A probability with two digits; none is shown as 0 or as 1."""
    if value is not None and value < 0.01:
        return "below 0.01"
    return "above 0.99" if value is not None and value > 0.99 else number(value, 2)


def millionths(value: float | None) -> str:
    """A reward in millionths, with three digits that count and no exponent: '1,130' or '−1.4'."""
    if value is None or not math.isfinite(value):
        return DASH
    scaled = MILLIONTHS * value
    if abs(scaled) >= 1e9:
        return significant(scaled)
    decimals = 0 if abs(scaled) >= 10 else 1
    return f"{scaled:,.{decimals}f}".replace("-", "−")


def margins_sentence(rows: Sequence[Row]) -> str:
    """How many margins are no larger than their noise, and how sure the judge is of the middle."""
    known = [row for row in rows if None not in (row["margin"], row["margin_standard_error"])]
    parts = []
    if known:
        noisy = sum(row["margin"] < NOISY * row["margin_standard_error"] for row in known)
        parts.append(
            f"{noisy} of {len(known)} margins are smaller than twice their standard error."
        )
    sure = [row["probability"] for row in rows if row["probability"] is not None]
    if sure:
        parts.append(f"Half of the pairs have p(winner > loser) above {np.median(sure):.2f}.")
    return " ".join(parts)


def human_look(row: Row, images: Pictures, notes: Sequence[str] = ()) -> Look:
    """One pair that people ranked, or a liked image beside a disliked one with its own prompt."""
    origin = f"{row['source_file']}, row {row['source_row']}" if row.get("source_file") else ""
    labels = ("chosen", "other")
    if "loser_prompt" in row:
        labels = ("liked", "disliked")
        origin += (
            f"; the disliked one, {row['loser_source_file']}, row {row['loser_source_row']}, was made from "
            f"“{row['loser_prompt']}”"
        )
    return Look(
        prompt=row["prompt"],
        pictures=[
            Shown(label=label, image=image) for label, image in zip(labels, images, strict=True)
        ],
        notes=[*notes, *filter(None, [origin])],
        name=row["pair_id"],
    )


def like_look(row: Row, image: Thumbnail) -> Look:
    """One image that was liked or disliked by itself."""
    label = "liked" if row["is_liked"] else "disliked"
    return Look(
        prompt=row["prompt"],
        pictures=[Shown(label=label, image=image)],
        notes=[f"{row['source_file']}, row {row['source_row']}"],
        name=row["image_id"],
    )


def most_wrong(judged: Sequence[Row]) -> list[Row]:
    """The held-out pairs that a judge gets wrong, the one it is surest of first."""
    wrong = [row for row in judged if row["winner_reward"] < row["loser_reward"]]
    return sorted(wrong, key=lambda row: (row["probability"], row["pair_id"]))


def wrong_notes(row: Row, policy: str, first: Mapping[str, Row], first_policy: str) -> list[str]:
    """What a judge says of a held-out pair that it gets wrong, and what iteration 0's said of it."""
    margin = row["winner_reward"] - row["loser_reward"]
    notes = [
        f"{policy}: p(chosen > other) {chance(row['probability'])}, margin "
        f"{millionths(margin)} millionths"
    ]
    before = first.get(row["pair_id"])
    if before is not None and policy != first_policy:
        was_right = before["winner_reward"] > before["loser_reward"]
        notes.append(
            f"{first_policy} had it {'right' if was_right else 'wrong'}: p "
            f"{chance(before['probability'])}"
        )
    return notes
