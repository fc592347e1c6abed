"""Paired comparisons of policies over prompts, and the measures that guard a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from scipy import stats

PerPrompt = Float[NDArray[np.floating], " prompt"]

NUM_RESAMPLES = 9999
"""Bootstrap resamples of an interval."""


@dataclass(frozen=True)
class Comparison:
    """A policy against a baseline on the same prompts and the same initial noise."""

    num_prompts: int
    mean: float
    baseline_mean: float
    difference: float
    ci_low: float
    ci_high: float
    win_rate: float


def compare(scores: PerPrompt, baseline: PerPrompt) -> Comparison:
    """Means, paired mean difference with its 95 % bootstrap interval over prompts, win rate.

    A draw counts half a win. ValueError unless both have the same prompts, at least 2.
    """
    if scores.shape != baseline.shape or len(scores) < 2:
        raise ValueError(
            f"a paired comparison needs the same prompts, at least 2: found {len(scores)} and "
            f"{len(baseline)}"
        )
    differences = scores.astype(np.float64) - baseline.astype(np.float64)
    low, high = mean_interval(differences)
    wins = float((differences > 0).mean() + 0.5 * (differences == 0).mean())
    return Comparison(
        num_prompts=len(differences),
        mean=float(scores.mean(dtype=np.float64)),
        baseline_mean=float(baseline.mean(dtype=np.float64)),
        difference=float(differences.mean()),
        ci_low=low,
        ci_high=high,
        win_rate=wins,
    )


def mean_interval(values: Float[NDArray[np.float64], " value"]) -> tuple[float, float]:
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


def rank_correlation(
    rewards: Float[NDArray[np.floating], "prompt candidate"],
    truth: Float[NDArray[np.floating], "prompt candidate"],
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


def mean_pairwise_distance(images: UInt8[NDArray[np.uint8], "image height width rgb"]) -> float:
    """Root mean squared difference of two images of one prompt, mean over all pairs, in [0, 1]."""
    flat = images.reshape(len(images), -1).astype(np.float64) / 255
    first, second = np.triu_indices(len(flat), k=1)
    return float(np.sqrt(np.square(flat[first] - flat[second]).mean(axis=1)).mean())
