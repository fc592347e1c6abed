"""Comparisons and guards' measures against scipy, brute force and hand formulas."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import pdist

from stages.core.evaluation.statistics import (
    NUM_RESAMPLES,
    clustered_share_interval,
    compare,
    effect_size,
    group_units,
    holm,
    mean_interval,
    mean_over_pairs,
    pixel_distance,
    rank_correlation,
    reliability,
    share_interval,
    sign_test,
    signed_rank_test,
    wilson,
    win_interval,
)


def test_comparison_of_hand_scores() -> None:
    scores, baseline = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 2.0, 4.0, 1.0])
    found = compare(scores, baseline)  # differences 1, 0, -1, 3
    assert (found.num_prompts, found.mean, found.baseline_mean) == (4, 2.5, 1.75)
    assert found.difference == 0.75
    assert found.win_rate == (2 + 0.5) / 4
    assert found.ci_low < 0.75 < found.ci_high


def test_wins_draws_losses_and_tests_of_hand_scores() -> None:
    scores, baseline = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 2.0, 4.0, 1.0])
    found = compare(scores, baseline)  # differences 1, 0, -1, 3
    assert (found.num_wins, found.num_ties, found.num_losses) == (2, 1, 1)
    assert found.sign_p == 1.0  # 2 of 3: p = min(1, 2 * 0.5)
    assert found.effect_size == pytest.approx(0.75 / math.sqrt(35 / 12))
    # points 1, 0.5, 0, 1 have variance 0.171875, a coin of 0.625 has 0.234375
    assert (found.win_low, found.win_high) == wilson(0.625, 4 * 0.234375 / 0.171875)


def test_win_interval_without_draws_is_wilsons_and_with_draws_alone_has_no_width() -> None:
    points = np.array([1.0, 1.0, 0.0, 1.0, 0.0])
    assert win_interval(0.6, points) == pytest.approx(share_interval(3, 5))
    assert win_interval(1.0, np.ones(9)) == pytest.approx(share_interval(9, 9))
    assert win_interval(0.0, np.zeros(9)) == pytest.approx(share_interval(0, 9))
    assert win_interval(0.5, np.full(4, 0.5)) == (0.5, 0.5)


def test_prompts_of_one_cluster_count_as_one_observation() -> None:
    rng = np.random.default_rng(3)
    scores, baseline = rng.random(30), rng.random(30)
    single = compare(scores, baseline)
    clusters = np.repeat(np.arange(30), 5)
    repeated = compare(np.repeat(scores, 5), np.repeat(baseline, 5), clusters=clusters)
    assert repeated.num_prompts == 150
    for name in (
        "mean",
        "difference",
        "win_rate",
        "sign_p",
        "wilcoxon_p",
        "effect_size",
        "win_low",
        "win_high",
    ):
        assert getattr(repeated, name) == pytest.approx(getattr(single, name), rel=1e-12), name
    width = single.ci_high - single.ci_low
    assert repeated.ci_low == pytest.approx(single.ci_low, abs=0.02 * width)
    assert repeated.ci_high == pytest.approx(single.ci_high, abs=0.02 * width)
    naive = compare(np.repeat(scores, 5), np.repeat(baseline, 5))
    assert naive.ci_high - naive.ci_low < 0.6 * width


def test_stratified_interval_equals_scipys_of_several_samples() -> None:
    rng = np.random.default_rng(6)
    samples = [rng.exponential(scale, size=size) for scale, size in ((1, 40), (3, 25), (0.5, 60))]
    values = np.concatenate(samples)
    strata = np.repeat([0, 1, 2], [40, 25, 60])
    low, high = group_units(values, strata, np.arange(len(values))).interval()

    def whole_mean(*parts: np.ndarray, axis: int = -1) -> np.ndarray:
        weights = np.array([40, 25, 60]) / 125
        return sum(w * part.mean(axis=axis) for w, part in zip(weights, parts, strict=True))

    expected = stats.bootstrap(
        samples, whole_mean, n_resamples=NUM_RESAMPLES, rng=np.random.default_rng(0)
    ).confidence_interval  # the same draws
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_interval_of_clusters_of_many_sizes_equals_scipys_of_a_ratio() -> None:
    rng = np.random.default_rng(8)
    counts = np.array([40, 1, 1, 2, 3, 1, 25, 1, 1, 2, 5, 1])
    clusters = np.repeat(np.arange(12), counts)
    values = rng.exponential(size=12)[clusters] + rng.random(len(clusters))
    sums = np.bincount(clusters, weights=values)
    low, high = group_units(values, np.zeros(len(values), np.int64), clusters).interval()

    def mean_of_values(sums: np.ndarray, counts: np.ndarray, axis: int = -1) -> np.ndarray:
        return sums.sum(axis=axis) / counts.sum(axis=axis)

    expected = stats.bootstrap(
        (sums, counts),
        mean_of_values,
        paired=True,
        n_resamples=NUM_RESAMPLES,
        rng=np.random.default_rng(0),
    ).confidence_interval  # the same draws
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    compared = compare(values, np.zeros(len(values)), clusters=clusters)
    assert (compared.ci_low, compared.ci_high) == (low, high)
    assert compared.difference == pytest.approx(sums.sum() / counts.sum())
    assert low < compared.difference < high


def test_strata_take_their_levels_out_of_the_interval() -> None:
    rng = np.random.default_rng(7)
    strata = np.repeat([0, 1], 50)
    scores = 10.0 * strata + rng.standard_normal(100)
    whole = compare(scores, np.zeros(100))
    within = compare(scores, np.zeros(100), strata=strata)
    assert within.ci_high - within.ci_low < 0.4 * (whole.ci_high - whole.ci_low)
    error = math.sqrt(sum(scores[strata == s].var(ddof=1) / 50 for s in (0, 1))) / 2
    assert within.ci_high - within.ci_low == pytest.approx(2 * 1.96 * error, rel=0.06)


@pytest.mark.parametrize(("rises", "falls", "draws"), [(7, 2, 3), (0, 5, 0), (4, 4, 1), (1, 0, 0)])
def test_sign_test_sums_the_binomial_tails(rises: int, falls: int, draws: int) -> None:
    number, extreme = rises + falls, min(rises, falls)
    tail = sum(math.comb(number, k) for k in range(extreme + 1)) / 2**number
    values = np.array([1.5] * rises + [-0.1] * falls + [0.0] * draws)
    assert sign_test(values) == pytest.approx(min(1.0, 2 * tail))


def test_signed_rank_test_equals_the_share_of_all_sign_patterns() -> None:
    values = np.array([0.3, -0.1, 0.9, 1.4, -0.5, 0.7, 2.0, 1.1])
    ranks = stats.rankdata(abs(values))
    patterns = np.array(list(product([0, 1], repeat=len(values)))) @ ranks
    centre = ranks.sum() / 2
    found = abs(ranks[values > 0].sum() - centre)
    expected = (abs(patterns - centre) >= found - 1e-9).mean()
    assert signed_rank_test(values) == pytest.approx(expected)


def test_signed_rank_test_gives_half_of_the_draws_ranks_to_each_side() -> None:
    # six draws take the ranks 1 to 6; of 7, 8, 9 and 10, any signs, 10 of 16 sums are as far from 17 as 24 is
    values = np.array([0.1, 0.2, 0.3, -0.4, *[0.0] * 6])
    assert signed_rank_test(values) == pytest.approx(10 / 16)


def test_tests_of_nothing_but_draws_find_nothing() -> None:
    assert sign_test(np.zeros(5)) == signed_rank_test(np.zeros(5)) == 1.0
    assert effect_size(np.zeros(5)) == 0.0
    assert math.isnan(effect_size(np.ones(5)))


def test_holm_equals_its_definition() -> None:
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert holm([0.04, 0.001, 0.5]) == pytest.approx([0.08, 0.003, 0.5])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    values = np.random.default_rng(0).random(20) ** 3
    for level in (0.01, 0.05, 0.2):
        rejected = set()
        for place, index in enumerate(np.argsort(values)):
            if values[index] > level / (20 - place):
                break
            rejected.add(int(index))
        found = holm(values.tolist())
        assert {i for i, value in enumerate(found) if value <= level} == rejected


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (7, 10), (10, 10), (1, 1)])
def test_wilson_equals_scipys_for_whole_counts(hits: int, trials: int) -> None:
    assert wilson(hits / trials, trials) == pytest.approx(share_interval(hits, trials), abs=1e-12)


def test_clustered_interval_of_hand_clusters() -> None:
    points = np.array([1, 1, 1, 1, 0, 0, 1, 0], np.float64)  # 5 of 8
    clusters = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    # residuals of 2 - 2 x 5/8, twice, 0 - 2 x 5/8 and 1 - 2 x 5/8: 2 x 0.5625 + 1.5625 + 0.0625 = 2.75
    variance = 4 / 3 * 2.75 / 64
    independent = (5 / 8) * (3 / 8) / variance * (1.959964 / 3.182446) ** 2
    assert clustered_share_interval(points, clusters) == pytest.approx(
        wilson(5 / 8, independent), abs=1e-6
    )
    assert clustered_share_interval(points, np.arange(8)) == pytest.approx(wilson(5 / 8, 8))
    low, high = clustered_share_interval(points, clusters)
    assert low < wilson(5 / 8, 8)[0]
    assert high > wilson(5 / 8, 8)[1]


def test_clustered_interval_at_its_ends() -> None:
    assert clustered_share_interval(np.ones(6), np.array([0, 0, 0, 1, 1, 1])) == wilson(1.0, 2)
    assert clustered_share_interval(np.ones(3), np.zeros(3, np.int64)) == (0.0, 1.0)
    low, high = clustered_share_interval(np.full(20, 0.5), np.arange(20))  # no opinion at all
    assert low < 0.5 < high
    # alike in every cluster: no narrower than as many independent trials
    even = np.tile([1.0, 0.0], 10)
    assert clustered_share_interval(even, np.arange(20) // 2) == pytest.approx(wilson(0.5, 20))
    even[-1] = 1.0  # alike in all clusters but one
    assert clustered_share_interval(even, np.arange(20) // 2) == pytest.approx(wilson(0.55, 20))


def test_reliability_of_hand_pairs() -> None:
    low, high = reliability(np.array([0.9, 0.4, 0.6, 0.05]), num_bins=2)
    assert (low.num_pairs, high.num_pairs) == (2, 2)
    assert low.mean_probability == pytest.approx(0.6)  # 0.4 is 60 % sure, and wrong
    assert low.share_right == 0.5
    assert high.mean_probability == pytest.approx((0.9 + 0.95) / 2)
    assert high.share_right == 0.5
    assert [part.share_right for part in reliability(np.array([0.5]))] == [0.5]


def test_reliability_of_a_calibrated_judge_lies_on_the_diagonal() -> None:
    rng = np.random.default_rng(8)
    truth = rng.random(20000)
    first_wins = rng.random(20000) < truth
    bins = reliability(np.where(first_wins, truth, 1 - truth))
    assert sum(part.num_pairs for part in bins) == 20000
    for part in bins:
        assert part.share_right == pytest.approx(part.mean_probability, abs=0.03)


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


def test_pixel_distance_of_hand_pictures() -> None:
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    assert pixel_distance(black, white) == 1.0
    assert pixel_distance(black, black) == 0.0
    grey = black.copy()
    grey[0, 0] = 51  # a quarter of the pixels differs by 0.2
    assert pixel_distance(black, grey) == pixel_distance(grey, black) == pytest.approx(0.1)
    # black-black 0, black-white 1 twice
    assert mean_over_pairs([black, black, white], pixel_distance) == pytest.approx(2 / 3)
    assert math.isnan(mean_over_pairs([black], pixel_distance))


def test_pixel_distance_is_scipys_over_the_root_of_the_number_of_values() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)
    distances = pdist(images.reshape(5, -1) / 255) / math.sqrt(4 * 4 * 3)
    found = mean_over_pairs(list(images), pixel_distance)
    assert found == pytest.approx(distances.mean(), rel=1e-12)
