"""What follows from runs of several seeds for a claim. The seed is the unit: its runs are paired."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stages.core.laboratory.experiments import LAST, MIN_SEEDS, Claim, Side

Verdict = Literal["holds", "holds in part", "does not hold here", "too few seeds", "not measured"]
MAX_EXACT = 6
"""Seeds up to which every resample is enumerated: 6^6 = 46,656 of them."""
RESAMPLES = 20_000

Key = tuple[str, int, str, str]
"""(arm, seed, policy, measure)."""
Values = Mapping[Key, float]


@dataclass(frozen=True)
class Compared:
    """A comparison of two sides, seed by seed."""

    measure: str
    left: Side
    right: Side
    differences: tuple[float, ...]
    """Left minus right, of each seed that has both."""
    low: float
    high: float
    """95 % bootstrap interval of their mean over seeds; nan for none."""

    @property
    def mean(self) -> float:
        """Of the differences; nan for none."""
        return float(np.mean(self.differences)) if self.differences else float("nan")

    @property
    def holds(self) -> bool:
        """Whether the whole interval is above 0."""
        return len(self.differences) >= MIN_SEEDS and self.low > 0


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over seeds; (nan, nan) for none.

    Exact, over all resamples, for up to MAX_EXACT seeds. With few seeds such an interval is too narrow: where all
    of five differences have one sign it never holds 0.
    """
    values = np.array(differences, np.float64)
    count = len(values)
    if count == 0:
        return float("nan"), float("nan")
    if count <= MAX_EXACT:
        places = np.array(list(itertools.product(range(count), repeat=count)))
    else:
        places = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    low, high = np.quantile(values[places].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def compared(measure: str, left: Side, right: Side, values: Values) -> Compared:
    """The two sides on the seeds that have both."""
    seeds = sorted({seed for arm, seed, *_ in values if arm == left.arm})
    found = []
    for seed in seeds:
        pair = [value_of(side, seed, measure, values) for side in (left, right)]
        if None not in pair:
            found.append(float(pair[0] - pair[1]))  # type: ignore[operator]
    return Compared(measure, left, right, tuple(found), *interval(found))


def value_of(side: Side, seed: int, measure: str, values: Values) -> float | None:
    """A measure of one policy; None if it was not measured."""
    policy = side.policy
    if policy == LAST:
        names = [
            p for a, s, p, m in values if (a, s, m) == (side.arm, seed, measure) and p != "base"
        ]
        policy = max(names, default="")
    return values.get((side.arm, seed, policy, measure))


def judge(claim: Claim, values: Values) -> tuple[Verdict, list[Compared]]:
    """(verdict, comparisons): it holds if each interval is above 0, in part if some are."""
    found = [compared(*each, values) for each in claim.comparisons]
    fewest = min(len(each.differences) for each in found)
    if fewest == 0:
        return "not measured", found
    if fewest < MIN_SEEDS:
        return "too few seeds", found
    number = sum(each.holds for each in found)
    if number == len(found):
        return "holds", found
    return ("holds in part" if number else "does not hold here"), found
