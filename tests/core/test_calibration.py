"""Weights of timesteps: fixed ones, fitted ones, and what no data can fit."""

from __future__ import annotations

import numpy as np
import pytest

from stages.core.method.calibration import (
    EQUAL,
    NUM_BINS,
    BinWeights,
    Shape,
    bin_features,
    cross_fitted,
    fit,
    fit_shape,
    folds_by_prompt,
    log_losses,
    snr_weights,
    softened_log_loss,
)
from stages.core.method.rewards import implicit_reward, margin_standard_error, weighted_mean

PROMPTS = np.repeat(np.arange(400), 2)


def pairs(slopes: np.ndarray, spreads: np.ndarray, seed: int = 0) -> np.ndarray:
    """Features of pairs whose labels follow Bradley and Terry with these slopes."""
    rng = np.random.default_rng(seed)
    features = spreads * rng.normal(size=(len(PROMPTS), NUM_BINS))
    is_second_better = rng.random(len(features)) > 1 / (1 + np.exp(-features @ slopes))
    return np.where(is_second_better[:, None], -features, features)


def test_equal_weights_give_the_plain_reward_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    policy, reference = rng.normal(size=(2, 8, 10)).astype(np.float32)
    plain = implicit_reward(policy_errors=policy, reference_errors=reference)
    gain = reference.astype(np.float64) - policy.astype(np.float64)
    assert np.array_equal(plain.reward, gain.mean(axis=1))
    weighted = implicit_reward(
        policy_errors=policy, reference_errors=reference, weights=np.ones(10)
    )
    np.testing.assert_allclose(weighted.reward, plain.reward, rtol=1e-12)
    np.testing.assert_allclose(weighted.standard_error, plain.standard_error, rtol=1e-12)


def test_weighted_rewards_by_hand() -> None:
    reward, error = weighted_mean(np.array([[1.0, 4.0, 1.0]]), np.array([1.0, 2.0, 0.0]))
    assert reward == pytest.approx(3.0)  # (1 + 8) / 3
    # ratio of sums: sqrt(1 * (1 - 3)^2 + 4 * (4 - 3)^2) / 3, times sqrt(3 / 2)
    assert error == pytest.approx(np.sqrt(8) / 3 * np.sqrt(1.5))
    found = margin_standard_error(
        policy_errors=np.array([[0.0, 0, 0], [1, 4, 1]]),
        reference_errors=np.zeros((2, 3)), best=0, worst=1, weights=np.array([1.0, 2.0, 0.0]),
    )  # fmt: skip
    assert found == pytest.approx(error[0])


def test_weights_of_draws_by_hand() -> None:
    weights = BinWeights(np.arange(10.0))
    assert weights.of(np.array([0, 99, 100, 999]), 1000).tolist() == [0, 0, 1, 9]
    assert weights.of(np.array([0, 19]), 20).tolist() == [0, 9]
    with pytest.raises(ValueError, match="expected 0 to 19"):
        weights.of(np.array([0, 20]), 20)


def test_weights_by_the_signal_to_noise_ratio_by_hand() -> None:
    ratios = 2.0 ** -np.arange(20)  # the middles of ten bins are 1, 3, 5, ...
    found = snr_weights(ratios, 1.0).weights
    np.testing.assert_allclose(found / found[0], 4.0 ** np.arange(10))
    assert found.mean() == pytest.approx(1)
    np.testing.assert_allclose(snr_weights(ratios, 0.0).weights, np.ones(10))
    half = snr_weights(ratios, 0.5).weights
    np.testing.assert_allclose(half / half[0], 2.0 ** np.arange(10))


def test_features_add_up_to_the_plain_mean_and_lie_in_their_bins() -> None:
    gains = np.array([[1.0, 2.0, 3.0, 6.0]])
    features = bin_features(gains, np.array([[0, 150, 170, 999]]), 1000)
    assert features.tolist() == [[0.25, 1.25, 0, 0, 0, 0, 0, 0, 0, 1.5]]


def test_the_gradient_finds_the_least_loss() -> None:
    """No step away from what was fitted lowers the penalised loss."""
    features = pairs(np.linspace(0, 2, NUM_BINS), np.ones(NUM_BINS))[:150]
    shape = Shape(power=0.0, step=1.0)
    unit = np.sqrt(np.mean(features.sum(axis=1) ** 2))

    def loss(logs: np.ndarray) -> float:
        penalty = (np.diff(logs) ** 2).sum() / (2 * len(features))
        return float(log_losses(features @ np.exp(logs) / unit).mean() + penalty)

    found = np.log(fit_shape(features, shape) * unit)
    rng = np.random.default_rng(1)
    for size in (1e-3, 1e-2, 0.1):
        for direction in rng.normal(size=(20, NUM_BINS)):
            assert loss(found) <= loss(found + size * direction) + 1e-9


def test_a_planted_bin_is_found_and_its_temperature() -> None:
    slopes = np.zeros(NUM_BINS)
    slopes[8] = 4.0
    weights, shape = fit(pairs(slopes, np.ones(NUM_BINS)), PROMPTS, np.random.default_rng(0))
    assert shape.step > 0
    assert weights.weights.argmax() == 8
    assert weights.weights[8] > 4 * np.delete(weights.weights, 8).max()
    assert weights.log_odds * weights.weights[8] == pytest.approx(4.0, rel=0.2)


def test_loud_bins_that_know_nothing_are_turned_down() -> None:
    spreads = np.r_[np.full(5, 3.0), np.full(5, 0.3)]
    features = pairs(np.r_[np.zeros(5), np.full(5, 2.0)], spreads)
    weights, _ = fit(features, PROMPTS, np.random.default_rng(0))
    assert weights.weights[5:].min() > 3 * weights.weights[:5].max()


def test_where_equal_weights_are_right_they_stay_and_the_temperature_is_recovered() -> None:
    features = pairs(np.full(NUM_BINS, 0.7), np.ones(NUM_BINS))
    weights, shape = fit(features, PROMPTS, np.random.default_rng(0))
    assert shape == EQUAL
    np.testing.assert_allclose(weights.weights, 1.0)
    assert weights.log_odds == pytest.approx(0.7, rel=0.2)


@pytest.mark.parametrize("num_judges", [4, pytest.param(12, marks=pytest.mark.slow)])
def test_a_judge_that_knows_nothing_is_found_to_know_nothing(num_judges: int) -> None:
    """Labels by coin: hardly any weight follows them, and pairs left out are a coin."""
    shapes, rights = [], []
    for seed in range(num_judges):
        features = pairs(np.zeros(NUM_BINS), np.linspace(3, 0.3, NUM_BINS), seed)
        rng = np.random.default_rng(seed)
        shapes.append(fit(features, PROMPTS, rng)[1])
        for chosen, weights in cross_fitted(features, PROMPTS, rng, (EQUAL, Shape(1.0, 0.3))):
            rights += list(features[chosen] @ weights.weights > 0)
    assert sum(shape == EQUAL for shape in shapes) > num_judges / 3
    assert (
        sum(shape.step == 0 for shape in shapes) > num_judges * 2 / 3
    )  # others are fixed by the spreads alone
    assert np.mean(rights) == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(len(rights)))


def test_pairs_of_one_prompt_share_their_fold_and_never_fit_their_own_weights() -> None:
    rng = np.random.default_rng(0)
    folds = folds_by_prompt(PROMPTS, rng)
    assert (folds[::2] == folds[1::2]).all()
    assert np.bincount(folds).tolist() == [160] * 5
    features = pairs(np.full(NUM_BINS, 0.5), np.ones(NUM_BINS))
    seen = []
    for chosen, weights in cross_fitted(features, PROMPTS, np.random.default_rng(3), (EQUAL,)):
        others = np.setdiff1d(np.arange(len(features)), chosen)
        assert not set(PROMPTS[chosen]) & set(PROMPTS[others])
        expected = fit_shape(features[others], EQUAL)
        np.testing.assert_allclose(weights.weights * weights.log_odds, expected)
        seen += list(chosen)
    assert sorted(seen) == list(range(len(features)))


def test_weights_on_top_of_fixed_ones() -> None:
    fixed, features = np.linspace(0.1, 2, NUM_BINS), pairs(np.ones(NUM_BINS), np.ones(NUM_BINS))
    found = BinWeights(np.full(NUM_BINS, 1.0), 3.0).times(fixed)
    assert found.weights.mean() == pytest.approx(1)
    np.testing.assert_allclose(
        features @ found.weights * found.log_odds, 3 * (features * fixed).sum(axis=1)
    )


def test_a_judge_without_an_opinion_keeps_equal_weights() -> None:
    weights, shape = fit(np.zeros((800, NUM_BINS)), PROMPTS, np.random.default_rng(0))
    assert (shape, weights.weights.tolist()) == (EQUAL, [1.0] * NUM_BINS)


def test_an_empty_bin_gets_no_say() -> None:
    features = pairs(np.ones(NUM_BINS), np.ones(NUM_BINS))
    features[:, 4] = 0
    for shape in (Shape(2.0, 0.0), Shape(1.0, 1.0)):
        assert fit_shape(features, shape)[4] == 0


def test_weights_by_the_spreads_power_by_hand() -> None:
    rng = np.random.default_rng(4)
    spreads = np.array([1.0, 2.0, 4.0])
    features = spreads * rng.choice([-1.0, 1.0], size=(200, 3)) + 0.2 * spreads
    found = fit_shape(features, Shape(power=1.5))
    measured = np.sqrt((features**2).mean(axis=0))
    np.testing.assert_allclose(found / found[0], (measured / measured[0]) ** -1.5, rtol=1e-9)
    assert found[0] > found[1] > found[2] > 0


def test_softened_log_loss_of_hand_logits() -> None:
    # of four margins of 4 one is wrong: c is best where c x 4 is the log-odds of 3 to 1
    loss, share = softened_log_loss(np.array([4.0, 4.0, 4.0, -4.0]))
    assert share == pytest.approx(np.log(3) / 4, rel=1e-6)
    assert loss == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25), rel=1e-6)
