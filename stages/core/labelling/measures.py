"""What can be said of answers: pace, agreement, favourite place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Literal

import krippendorff
import numpy as np
from scipy.stats import rankdata

from stages.core.evaluation.statistics import share_interval
from stages.core.labelling.answers import Answer

NUM_GAPS = 50
"""Answers that a pace is measured over."""
BREAK_SECONDS = 120.0
"""A longer time between two answers is a break, and counts for no pace."""
MIN_GAPS = 3
"""Fewer say nothing."""

Verdict = Mapping[str, int]
"""Ranks of images by their names."""


def seconds_per_pair(answers: Iterable[Answer]) -> float | None:
    """Mean time between two answers of one person's last ones, breaks left out; None of too few."""
    times = sorted(answer.at for answer in answers)[-NUM_GAPS - 1 :]
    gaps = [(later - earlier).total_seconds() for earlier, later in pairwise(times)]
    gaps = [gap for gap in gaps if gap <= BREAK_SECONDS]
    return float(np.mean(gaps)) if len(gaps) >= MIN_GAPS else None


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far people agree on the pairs, or the sets, that several of them judged."""

    num_pairs: int
    """Pairs or sets that two or more have judged."""
    num_labellers: int
    """People who judged one of them."""
    raw: float | None
    """Share of equal verdicts among all pairs of verdicts on one pair of images; None without any."""
    alpha: float | None
    """Krippendorff's alpha: 1 is full agreement, 0 is chance; None where all verdicts are alike."""
    is_ordinal: bool = False
    """Whether alpha is of ranks, to which a near rank is better than a far one."""


def agreement(answers: Iterable[Answer]) -> Agreement:
    """Over the better image of a pair, or neither (both bad too); or over the ranks of images in a set.

    Images of one rank have the mean of the ranks that they take up, 1, 2.5, 2.5 and 4. What was skipped
    says nothing. Krippendorff, Content Analysis, Ch. 11: nominal data, and ordinal ones for ranks, with
    verdicts missing.
    """
    verdicts: dict[str, dict[str, Verdict]] = defaultdict(dict)
    is_ordinal = False
    for answer in answers:
        if answer.verdict is not None:
            verdicts[answer.pair][answer.labeller] = answer.verdict
            is_ordinal |= answer.is_ranking
    several = [by_labeller for by_labeller in verdicts.values() if len(by_labeller) > 1]
    labellers = sorted({labeller for by_labeller in several for labeller in by_labeller})
    equal = [
        before == after
        for group in several
        for one, other in combinations(group.values(), 2)
        for before, after in zip(_signs(one), _signs(other), strict=True)
    ]
    return Agreement(
        num_pairs=len(several),
        num_labellers=len(labellers),
        raw=float(np.mean(equal)) if equal else None,
        alpha=_alpha(several, labellers, is_ordinal=is_ordinal),
        is_ordinal=is_ordinal,
    )


def _alpha(
    several: Sequence[Mapping[str, Verdict]], labellers: Sequence[str], *, is_ordinal: bool
) -> float | None:
    values = _mean_ranks if is_ordinal else _signs
    columns: list[Sequence[float]] = []
    for group in several:
        rows = {labeller: list(values(verdict)) for labeller, verdict in group.items()}
        width = len(next(iter(rows.values())))
        nothing = [np.nan] * width
        columns += zip(*(rows.get(labeller, nothing) for labeller in labellers), strict=True)
    table = np.array(columns, np.float64).T
    if len(np.unique(table[~np.isnan(table)])) < 2:
        return None
    level: Literal["nominal", "ordinal"] = "ordinal" if is_ordinal else "nominal"
    return float(krippendorff.alpha(reliability_data=table, level_of_measurement=level))


def _signs(verdict: Verdict) -> Iterator[float]:
    """Of each two images by name: -1 where the first is better, 1 where the second is, else 0."""
    ranks = [verdict[name] for name in sorted(verdict)]
    return (float(np.sign(one - other)) for one, other in combinations(ranks, 2))


def _mean_ranks(verdict: Verdict) -> Iterator[float]:
    """Of each image by name: its rank, the mean one where several share it."""
    return iter(rankdata([verdict[name] for name in sorted(verdict)]).tolist())


@dataclass(frozen=True)
class FirstShare:
    """How often the image that stood first (the left one of two) was called the best."""

    num_choices: int
    share: float
    low: float
    high: float
    expected: float = 0.5
    """The share of who has no favourite place: half of two images, a quarter of four."""

    @property
    def is_biased(self) -> bool:
        """Whether the interval leaves out the expected share."""
        return not self.low <= self.expected <= self.high


def first_share(answers: Iterable[Answer]) -> FirstShare | None:
    """Share of first images among those called best alone, with its 95 % Wilson interval; None of none."""
    firsts, chances = [], []
    for answer in answers:
        verdict = answer.verdict or {}
        best = [name for name, rank in verdict.items() if rank == 1]
        if len(best) == 1:
            firsts.append(best[0] == answer.left.name)
            chances.append(1 / len(answer.shown))
    if not firsts:
        return None
    low, high = share_interval(sum(firsts), len(firsts))
    return FirstShare(len(firsts), float(np.mean(firsts)), low, high, float(np.mean(chances)))
