"""Choosing a pair of candidates: hand cases, Eq. 10's pairwise rule, and the random ablation."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from stages.core.method.selection import best_worst, random_pair


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.1, 0.5, -0.2, 0.3], (1, 2)),
        ([1.0, 2.0], (1, 0)),
        ([2.0, 1.0, 2.0, 1.0], (0, 3)),
        ([0.0, 0.0, 0.0], (0, 2)),
    ],
)
def test_best_and_worst_of_hand_scores(scores: list[float], expected: tuple[int, int]) -> None:
    assert best_worst(np.array(scores)) == expected


def test_best_and_worst_win_every_comparison_of_eq_10() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores = rng.standard_normal(8)
        best, worst = best_worst(scores)
        wins = [sum(scores[i] > scores[j] for j in range(8)) for i in range(8)]
        assert (wins[best], wins[worst]) == (7, 0)


def test_random_pair_is_in_order_of_score_and_reaches_every_pair() -> None:
    scores = np.array([0.3, 0.1, 0.4, 0.2])
    found = Counter(random_pair(scores, np.random.default_rng(seed)) for seed in range(600))
    assert all(scores[better] > scores[worse] for better, worse in found)
    assert set(found) == {(i, j) for i, j in permutations(range(4), 2) if scores[i] > scores[j]}
    assert min(found.values()) > 60  # 100 each on average, deviation 9.1


def test_random_pair_of_equal_scores_is_two_different_candidates() -> None:
    for seed in range(20):
        first, second = random_pair(np.zeros(3), np.random.default_rng(seed))
        assert first != second


@pytest.mark.parametrize(
    ("scores", "reason"),
    [([1.0], "at least 2"), ([1.0, np.nan], "finite"), ([np.inf, 0], "finite")],
)
def test_scores_that_cannot_be_ranked_are_refused(scores: list[float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        best_worst(np.array(scores))
    with pytest.raises(ValueError, match=reason):
        random_pair(np.array(scores), np.random.default_rng(0))
