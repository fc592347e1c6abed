"""Comparisons and guards' measures against scipy, brute force and hand formulas."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from stages.core.statistics import (
    compare,
    mean_interval,
    mean_pairwise_distance,
    rank_correlation,
    share_interval,
)


def test_comparison_of_hand_scores() -> None:
    scores, baseline = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 2.0, 4.0, 1.0])
    found = compare(scores, baseline)  # differences 1, 0, -1, 3
    assert (found.num_prompts, found.mean, found.baseline_mean) == (4, 2.5, 1.75)
    assert found.difference == 0.75
    assert found.win_rate == (2 + 0.5) / 4
    assert found.ci_low < 0.75 < found.ci_high


def test_comparison_turned_around_is_its_mirror() -> None:
    rng = np.random.default_rng(1)
    scores, baseline = rng.random(40), rng.random(40)
    one, other = compare(scores, baseline), compare(baseline, scores)
    assert one.difference == pytest.approx(-other.difference)
    assert one.win_rate == pytest.approx(1 - other.win_rate)
    assert one.ci_low == pytest.approx(-other.ci_high, abs=0.01)


def test_comparison_with_itself_is_0_without_width() -> None:
    scores = np.random.default_rng(0).random(10).astype(np.float32)
    found = compare(scores, scores)
    assert (found.difference, found.ci_low, found.ci_high, found.win_rate) == (0, 0, 0, 0.5)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(("first", "second"), [(3, 4), (1, 1)])
def test_comparison_needs_the_same_prompts_and_at_least_two(first: int, second: int) -> None:
    with pytest.raises(ValueError, match=f"found {first} and {second}"):
        compare(np.zeros(first), np.zeros(second))


def test_mean_interval_is_that_of_the_normal_theory_for_a_normal_sample() -> None:
    values = np.random.default_rng(2).normal(3.0, 2.0, size=400)
    error = values.std(ddof=1) / math.sqrt(len(values))
    low, high = mean_interval(values)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_mean_interval_covers_the_true_mean_about_95_times_in_100() -> None:
    rng = np.random.default_rng(5)
    intervals = [mean_interval(rng.exponential(1.0, size=40)) for _ in range(60)]
    hits = sum(low <= 1.0 <= high for low, high in intervals)
    assert 51 <= hits <= 60  # 57 on average at 95 %; 51 has probability 0.008 there


@pytest.mark.parametrize(
    "values", [[0.0, 1.0], [0.0] * 99 + [1.0], [5.0, 5.0 + 1e-12, 5.0], [2.0, 2.0]]
)
def test_mean_interval_of_nearly_constant_values_is_finite_and_in_their_range(
    values: list[float],
) -> None:
    low, high = mean_interval(np.array(values))
    assert min(values) <= low <= high <= max(values)


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (7, 10), (10, 10), (130, 200), (1, 1)])
def test_share_interval_equals_wilsons_formula(hits: int, trials: int) -> None:
    z = stats.norm.ppf(0.975)
    share = hits / trials
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = (
        z / (1 + z**2 / trials) * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    )
    low, high = share_interval(hits, trials)
    assert low == pytest.approx(max(0.0, centre - half), abs=1e-12)
    assert high == pytest.approx(min(1.0, centre + half), abs=1e-12)


def test_rank_correlation_equals_scipys_per_prompt_with_ties() -> None:
    rng = np.random.default_rng(4)
    rewards = rng.standard_normal((30, 8))
    truth = np.round(rewards + rng.standard_normal((30, 8)), 0)  # rounding makes ties
    rewards[3, :4] = rewards[3, 0]
    expected = np.mean(
        [stats.spearmanr(a, b).statistic for a, b in zip(rewards, truth, strict=True)]
    )
    assert rank_correlation(rewards, truth) == pytest.approx(expected, abs=1e-12)


def test_rank_correlation_of_equal_and_opposite_orders() -> None:
    rewards = np.array([[1.0, 2.0, 3.0]])
    assert rank_correlation(rewards, rewards**3) == pytest.approx(1.0)
    assert rank_correlation(rewards, -rewards) == pytest.approx(-1.0)


def test_rank_correlation_leaves_out_prompts_whose_candidates_are_all_alike() -> None:
    rewards = np.array([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0], [1.0, 2.0, 3.0]])
    truth = np.array([[1.0, 3.0, 2.0], [1.0, 2.0, 3.0], [4.0, 4.0, 4.0]])
    assert rank_correlation(rewards, truth) == pytest.approx(0.5)
    assert math.isnan(rank_correlation(rewards[1:], truth[1:]))


def test_mean_pairwise_distance_of_hand_pictures() -> None:
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    assert mean_pairwise_distance(np.stack([black, white])) == 1.0
    assert mean_pairwise_distance(np.stack([black, black])) == 0.0
    # black-black 0, black-white 1 twice
    assert mean_pairwise_distance(np.stack([black, black, white])) == pytest.approx(2 / 3)
    grey = black.copy()
    grey[0, 0] = 51  # a quarter of the pixels differs by 0.2
    assert mean_pairwise_distance(np.stack([black, grey])) == pytest.approx(0.1)


def test_mean_pairwise_distance_equals_a_loop_over_pairs() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)
    distances = [
        math.sqrt((((first / 255.0) - (second / 255.0)) ** 2).mean())
        for first, second in combinations(images, 2)
    ]
    assert mean_pairwise_distance(images) == pytest.approx(np.mean(distances), rel=1e-12)
