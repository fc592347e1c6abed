"""Paired comparisons of policies over prompts, and the measures that guard a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int, UInt8
from scipy import special, stats

PerPrompt = Float[np.ndarray, " prompt"]
Labels = Int[np.ndarray, " prompt"]
Item = TypeVar("Item")

NUM_RESAMPLES = 9999
"""Bootstrap resamples of an interval."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A policy against a baseline on the same prompts and the same initial noise."""

    num_prompts: int
    mean: float
    baseline_mean: float
    difference: float
    ci_low: float
    ci_high: float
    win_rate: float
    win_low: float
    win_high: float
    num_wins: int
    num_ties: int
    num_losses: int
    sign_p: float
    wilcoxon_p: float
    effect_size: float


def compare(
    scores: PerPrompt,
    baseline: PerPrompt,
    *,
    strata: Labels | None = None,
    clusters: Labels | None = None,
) -> Comparison:
    """The paired comparison: means, their difference, wins, two tests, an effect size.

    Intervals are of 95 %: bootstrap over prompts (within each stratum, prompts of one cluster drawn
    together), Wilson's for the win rate, where a draw counts half a win. Both tests are two-sided.
    Tests, effect size and Wilson's n take a cluster's mean difference for one observation; a
    cluster that spans strata counts once in each. ValueError unless both have the same prompts, at
    least 2.
    """
    if scores.shape != baseline.shape or len(scores) < 2:
        raise ValueError(
            f"a paired comparison needs the same prompts, at least 2: found {len(scores)} and "
            f"{len(baseline)}"
        )
    differences = scores.astype(np.float64) - baseline.astype(np.float64)
    strata = np.zeros(len(differences), np.int64) if strata is None else strata
    clusters = np.arange(len(differences)) if clusters is None else clusters
    units = group_units(differences, strata, clusters)
    low, high = units.interval() if units.are_grouped else mean_interval(differences)
    wins, ties = int((differences > 0).sum()), int((differences == 0).sum())
    win_rate = float((differences > 0).mean() + 0.5 * (differences == 0).mean())
    points = group_units(np.sign(differences) / 2 + 0.5, strata, clusters).means
    win_low, win_high = win_interval(win_rate, points)
    return Comparison(
        num_prompts=len(differences),
        mean=float(scores.mean(dtype=np.float64)),
        baseline_mean=float(baseline.mean(dtype=np.float64)),
        difference=float(differences.mean()),
        ci_low=low,
        ci_high=high,
        win_rate=win_rate,
        win_low=win_low,
        win_high=win_high,
        num_wins=wins,
        num_ties=ties,
        num_losses=len(differences) - wins - ties,
        sign_p=sign_test(units.means),
        wilcoxon_p=signed_rank_test(units.means),
        effect_size=effect_size(units.means),
    )


@dataclass(frozen=True)
class Units:
    """What the bootstrap draws: one entry for each cluster within a stratum."""

    sums: Float[np.ndarray, " unit"]
    """Of the unit's values."""
    counts: Int[np.ndarray, " unit"]
    """How many values it has."""
    strata: Int[np.ndarray, " unit"]
    """Its stratum's number, from 0."""

    @property
    def means(self) -> Float[np.ndarray, " unit"]:
        """Each unit's mean."""
        return self.sums / self.counts

    @property
    def are_grouped(self) -> bool:
        """Whether there is more than one stratum, or a unit of more than one value."""
        return bool(self.strata.max() > 0 or self.counts.max() > 1)

    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval (bias-corrected and accelerated) of the mean of all values.

        Each stratum's units are drawn from that stratum and its share of the values stays. Efron
        and Tibshirani, An Introduction to the Bootstrap, Sec. 14.3; with several strata as
        scipy.stats.bootstrap does for several samples.
        """
        rng = np.random.default_rng(0)
        estimate, drawn, cubes, squares = 0.0, np.zeros(NUM_RESAMPLES), 0.0, 0.0
        for stratum in range(self.strata.max() + 1):
            inside = self.strata == stratum
            sums, counts = self.sums[inside], self.counts[inside]
            share, number = counts.sum() / self.counts.sum(), len(sums)
            estimate += share * sums.sum() / counts.sum()
            drawn += share * _resampled_means(sums, counts, rng)
            if number > 1:
                left_out = share * (sums.sum() - sums) / (counts.sum() - counts)
                influence = (number - 1) * (left_out.mean() - left_out)
                cubes += (influence**3).sum() / number**3
                squares += (influence**2).sum() / number**2
        if np.ptp(drawn) == 0:
            return estimate, estimate
        below = ((drawn < estimate).mean() + (drawn <= estimate).mean()) / 2
        bias, acceleration = special.ndtri(below), cubes / (6 * squares**1.5)
        ends = bias + special.ndtri(np.array([0.025, 0.975]))
        levels = special.ndtr(bias + ends / (1 - acceleration * ends))
        low, high = np.quantile(drawn, levels)
        return float(low), float(high)


def group_units(values: PerPrompt, strata: Labels, clusters: Labels) -> Units:
    """The values of each cluster within each stratum, as one unit."""
    both = np.stack([np.unique(strata, return_inverse=True)[1], clusters], axis=1)
    units, place = np.unique(both, axis=0, return_inverse=True)
    return Units(
        sums=np.bincount(place, weights=values).astype(np.float64),
        counts=np.bincount(place).astype(np.int64),
        strata=units[:, 0].astype(np.int64),
    )


def _resampled_means(
    sums: Float[np.ndarray, " unit"],
    counts: Int[np.ndarray, " unit"],
    rng: np.random.Generator,
) -> Float[np.ndarray, " resample"]:
    """Means over units drawn with replacement, a thousand resamples at a time."""
    means = []
    for start in range(0, NUM_RESAMPLES, 1000):
        size = (min(1000, NUM_RESAMPLES - start), len(sums))
        chosen = rng.integers(0, len(sums), size)
        means.append(sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1))
    return np.concatenate(means)


def sign_test(differences: PerPrompt) -> float:
    """Exact two-sided p of as many rises as falls; draws are left out, 1 if all are draws."""
    rises, falls = int((differences > 0).sum()), int((differences < 0).sum())
    return float(stats.binomtest(rises, rises + falls).pvalue) if rises + falls else 1.0


def signed_rank_test(differences: PerPrompt) -> float:
    """Wilcoxon's two-sided p, half of the draws' ranks on each side; 1 if all are draws."""
    if not differences.any():
        return 1.0
    return float(stats.wilcoxon(differences, zero_method="zsplit").pvalue)


def effect_size(differences: PerPrompt) -> float:
    """d_z, mean over standard deviation of the differences; 0 if all are 0, nan if all are alike."""
    if np.ptp(differences) == 0:
        return 0.0 if differences[0] == 0 else float("nan")
    return float(differences.mean() / differences.std(ddof=1))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for being so many (Holm's step-down), in their order."""
    order = np.argsort(p_values)
    steps = np.sort(p_values) * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(steps)) if len(order) else steps
    return [float(value) for value in adjusted]


def mean_interval(values: Float[np.ndarray, " value"]) -> tuple[float, float]:
    """95 % bootstrap interval (bias-corrected and accelerated) of the mean of the values."""
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    interval = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=NUM_RESAMPLES,
        confidence_level=0.95,
        rng=np.random.default_rng(0),
        batch=1000,
    ).confidence_interval
    return float(interval.low), float(interval.high)


def share_interval(num_hits: int, num_trials: int) -> tuple[float, float]:
    """95 % Wilson interval of a share."""
    interval = stats.binomtest(num_hits, num_trials).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def win_interval(win_rate: float, points: Float[np.ndarray, " unit"]) -> tuple[float, float]:
    """95 % Wilson interval of a win rate whose units gave 1, 0 or, in a draw, one half.

    Draws vary less than wins and losses do, so Wilson's n is raised by the ratio of the two
    variances; without draws this is Wilson's interval. No width if every unit drew.
    """
    coin, found = win_rate * (1 - win_rate), float(points.var())
    if found > 0 and coin > 0:
        return wilson(win_rate, len(points) * coin / found)
    if 0 < win_rate < 1:
        return win_rate, win_rate
    return wilson(win_rate, len(points))


def wilson(share: float, num_trials: int | float) -> tuple[float, float]:
    """95 % Wilson interval of a share of trials, whose number need not be whole."""
    z = special.ndtri(0.975)
    centre = share + z**2 / (2 * num_trials)
    spread = share * (1 - share) / num_trials + z**2 / (4 * num_trials**2)
    half, scale = z * np.sqrt(spread), 1 + z**2 / num_trials
    return float(max(0, (centre - half) / scale)), float(min(1, (centre + half) / scale))


def clustered_share_interval(
    points: Float[np.ndarray, " trial"], clusters: Int[np.ndarray, " trial"]
) -> tuple[float, float]:
    """95 % interval of a share whose trials come in clusters; each gave 1, 0 or, in a tie, one half.

    Wilson's, with the number of independent trials that would vary as much: Korn and Graubard,
    "Confidence intervals for proportions with small expected number of positive counts estimated
    from survey data", with the variance of a ratio over clusters and their t quantile; never more
    than there are trials. Without clusters or ties it is Wilson's interval.
    """
    share, count = float(points.mean()), len(points)
    units = group_units(points, np.zeros(count, np.int64), clusters)
    number = len(units.sums)
    if number == count and set(np.unique(points)) <= {0.0, 1.0}:
        return wilson(share, count)
    if number < 2:
        return 0.0, 1.0
    residuals = units.sums - share * units.counts
    variance = number / (number - 1) * float(np.square(residuals).sum()) / count**2
    coin = share * (1 - share)
    if coin == 0:
        return wilson(share, number)
    shrink = (special.ndtri(0.975) / special.stdtrit(number - 1, 0.975)) ** 2
    independent = count if variance == 0 else min(count, shrink * coin / variance)
    return wilson(share, independent)


@dataclass(frozen=True, kw_only=True)
class ReliabilityBin:
    """Pairs that a judge was about equally sure of, and how often it was right."""

    num_pairs: int
    mean_probability: float
    share_right: float
    share_low: float
    share_high: float


def reliability(
    probabilities: Float[np.ndarray, " pair"],
    num_bins: int = 8,
    *,
    clusters: Int[np.ndarray, " pair"] | None = None,
) -> list[ReliabilityBin]:
    """How often a judge is right about pairs it is so sure of, in bins of equally many pairs.

    A probability is p(winner > loser) of a human pair. The judge's certainty is p or 1 - p,
    whichever is larger; it is right if p is above 0.5, and half right at 0.5. Pairs of one cluster are
    taken to be right or wrong together.
    """
    values = probabilities.astype(np.float64)
    clusters = np.arange(len(values)) if clusters is None else clusters
    certainty = np.maximum(values, 1 - values)
    right = (values > 0.5) + 0.5 * (values == 0.5)
    parts = np.array_split(np.argsort(certainty, kind="stable"), min(num_bins, len(values)))
    bins = []
    for part in parts:
        share_right = float(right[part].mean())
        low, high = clustered_share_interval(right[part], clusters[part])
        bins.append(
            ReliabilityBin(
                num_pairs=len(part),
                mean_probability=float(certainty[part].mean()),
                share_right=share_right,
                share_low=low,
                share_high=high,
            )
        )
    return bins


def rank_correlation(
    rewards: Float[np.ndarray, "prompt candidate"],
    truth: Float[np.ndarray, "prompt candidate"],
) -> float:
    """Spearman's correlation within each prompt's candidates, mean over prompts, in [-1, 1].

    Prompts whose candidates are all alike in one of the two say nothing and are left out; nan if
    none is left.
    """
    informative = (np.ptp(rewards, axis=1) > 0) & (np.ptp(truth, axis=1) > 0)
    ranks = [stats.rankdata(x[informative], axis=1) for x in (rewards, truth)]
    centred = [rank - rank.mean(axis=1, keepdims=True) for rank in ranks]
    product = (centred[0] * centred[1]).sum(axis=1)
    scale = np.sqrt(np.square(centred[0]).sum(axis=1) * np.square(centred[1]).sum(axis=1))
    return float((product / scale).mean()) if len(product) else float("nan")


def mean_over_pairs(items: Sequence[Item], distance: Callable[[Item, Item], float]) -> float:
    """Mean distance of two different items, over all pairs; nan of fewer than two."""
    found = [distance(first, second) for first, second in combinations(items, 2)]
    return float(np.mean(found)) if found else float("nan")


def pixel_distance(
    first: UInt8[np.ndarray, "height width rgb"],
    second: UInt8[np.ndarray, "height width rgb"],
) -> float:
    """Root mean squared difference of two images' values, in [0, 1]."""
    difference = first.astype(np.float64) / 255 - second.astype(np.float64) / 255
    return float(np.sqrt(np.square(difference).mean()))
