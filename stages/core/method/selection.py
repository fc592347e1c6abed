"""Which two of a prompt's candidates become a preference pair."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float

Strategy = Literal["best_worst", "random", "listwise", "spin"]
"""'listwise' keeps all candidates, for RankDPO's loss (listwise.py). 'spin' pairs a person's image with the policy's
own sample of its caption (Yuan et al., "Self-Play Fine-Tuning of Diffusion Models", whose loss is `dpo_loss` with the
policy before as reference and dpo_beta = 2 lambda)."""


def best_worst(scores: Float[np.ndarray, " candidate"]) -> tuple[int, int]:
    """(best, worst): the first of the highest and the last of the lowest scores, never the same.

    Paper: SAIL Sec. 4.1; by the scalar reward this is Eq. 10's pairwise rule.
    """
    _check(scores)
    best = int(np.argmax(scores))
    worst = len(scores) - 1 - int(np.argmin(scores[::-1]))
    return best, worst


def random_pair(
    scores: Float[np.ndarray, " candidate"], rng: np.random.Generator
) -> tuple[int, int]:
    """(better, worse) of two different candidates drawn at random. Paper: SAIL Table 5, 'random'."""
    _check(scores)
    first, second = sorted(int(i) for i in rng.choice(len(scores), size=2, replace=False))
    return (first, second) if scores[first] >= scores[second] else (second, first)


def folded(scores: Float[np.ndarray, " candidate"]) -> list[tuple[int, int]]:
    """(better, worse) of the best and the worst score, the second best and the second worst, and so on.

    With an odd number of scores the middle one is left out. Of equal scores the first ranks higher.
    """
    order = [int(place) for place in np.argsort(-scores, kind="stable")]
    return [(order[place], order[-1 - place]) for place in range(len(order) // 2)]


def win_probabilities(
    scores: Float[np.ndarray, " candidate"], log_odds: float
) -> Float[np.ndarray, " candidate"]:
    """The mean probability that an image is preferred to another of its list, in [0, 1].

    `log_odds` is for each unit of score; infinite says that the higher score is always preferred.
    """
    gaps = scores[:, None] - scores[None, :]
    wins = (
        0.5 * (1 + np.sign(gaps))
        if np.isinf(log_odds)
        else np.exp(-np.logaddexp(0.0, -log_odds * gaps))
    )
    return (wins.sum(axis=1) - 0.5) / (len(scores) - 1)


def _check(scores: Float[np.ndarray, " candidate"]) -> None:
    if len(scores) < 2:
        raise ValueError(f"a pair needs at least 2 candidates, found {len(scores)}")
    if not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite to be ranked, found {scores.tolist()}")
