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


def _check(scores: Float[np.ndarray, " candidate"]) -> None:
    if len(scores) < 2:
        raise ValueError(f"a pair needs at least 2 candidates, found {len(scores)}")
    if not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite to be ranked, found {scores.tolist()}")
