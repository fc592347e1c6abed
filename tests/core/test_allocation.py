"""Where draws go, by hand; that they are unbiased; and whose rewards need no more of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.core.method.adaptive import weighted_parts
from stages.core.method.allocation import (
    FLOOR,
    cannot_win_or_lose,
    completed,
    density_of,
    importance_weights,
    spread_order,
)
from stages.core.method.noising import allocated_timesteps, generator, stratified_timesteps
from stages.core.method.scoring import Errors


def test_density_is_neymans_with_a_floor_and_even_where_nothing_is_known() -> None:
    found = density_of(np.array([0.0, 1.0, 2.0]), np.array([9.0, 4.0, 1.0]))
    # weight x spread is 0, 4, 2: shares 0, 2, 1 of a mean of 1
    np.testing.assert_allclose(found, [FLOOR, FLOOR + 2 * (1 - FLOOR), 1.0], rtol=1e-12)
    np.testing.assert_allclose(density_of(np.ones(3), np.zeros(3)), 1.0)


def test_an_even_density_draws_the_timesteps_of_today() -> None:
    for seed in range(5):
        ours = allocated_timesteps(10, 1000, np.ones(10), generator(seed))
        assert torch.equal(ours, stratified_timesteps(10, 1000, generator(seed)))


def test_draws_fall_where_the_density_is_and_stay_within_the_schedule() -> None:
    density = np.array([0.1, 0.1, 0.1, 3.7])
    steps = torch.cat([allocated_timesteps(8, 1000, density, generator(s)) for s in range(400)])
    counts = np.bincount((steps * 4 // 1000).numpy(), minlength=4) / len(steps)
    np.testing.assert_allclose(counts, density / 4, atol=0.01)
    assert (steps.min() >= 0, steps.max() < 1000) == (True, True)


def test_weighted_draws_have_the_expectation_of_even_ones() -> None:
    rng = np.random.default_rng(0)
    value = rng.standard_normal(1000).cumsum()
    density = density_of(rng.random(10), rng.random(10))
    found = []
    for seed in range(4000):
        steps = allocated_timesteps(5, 1000, density, generator(seed)).numpy()
        found.append((value[steps] * importance_weights(steps, 1000, density)).mean())
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - value.mean()) < 3.5 * error + 1e-3
    assert error < 0.02 * value.std()  # the test can fail


def test_the_first_draws_of_the_order_are_spread_over_all() -> None:
    assert spread_order(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    for number in (1, 2, 3, 10, 50):
        assert sorted(spread_order(number)) == list(range(number))
    assert spread_order(10)[:4].tolist() == [0, 8, 4, 2]


def test_a_candidate_far_from_both_ends_is_told_and_the_ends_never() -> None:
    noise = np.array([0.01, -0.01, 0.02, -0.02])
    parts = np.array([[1.0] * 4, [0.0] * 4, [-1.0] * 4, [0.99] * 4]) + noise
    parts[3] += [0.3, -0.3, 0.2, -0.2]  # not told from the best
    assert cannot_win_or_lose(parts, 0.95).tolist() == [False, True, False, False]
    # by hand: gaps 0.8 and 1.2 have mean 1 and standard error 0.2; t(0.95, 1) = 6.31 and t(0.9, 1) = 3.08
    two = np.array([[1.0, 1.0], [0.2, -0.2], [-1.0, -1.0]])
    assert cannot_win_or_lose(two, 0.95).tolist() == [False, False, False]
    assert cannot_win_or_lose(two, 0.90).tolist() == [False, True, False]


def test_equal_candidates_are_never_told_apart() -> None:
    assert not cannot_win_or_lose(np.ones((5, 4)), 0.5).any()


def test_a_reward_of_fewer_draws_is_moved_by_what_moved_all() -> None:
    parts = np.array([[1.0, 3.0], [0.0, 2.0], [0.25, np.nan]])
    found = completed(parts, np.array([2, 2, 1]))
    # on the first draw it is 0.25 below the others' mean of 0.5; over both they have a mean of 1.5
    np.testing.assert_allclose(found, [2.0, 1.0, 1.25], rtol=1e-12)


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_dropping_keeps_the_best_and_the_worst_of_clear_candidates(share: float) -> None:
    rng = np.random.default_rng(1)
    truth = np.linspace(-1, 1, 8)
    parts = truth[:, None] + 0.2 * rng.standard_normal((200, 8, 6))
    dropped = np.array([cannot_win_or_lose(part, 0.95) for part in parts])
    assert dropped[:, [0, 7]].sum() == 0
    assert dropped[:, 2:6].mean() > share


def test_what_each_draw_adds_to_a_reward_by_hand() -> None:
    errors = Errors(
        policy=torch.tensor([[1.0, 2.0, 9.0], [4.0, 4.0, 9.0]]),
        reference=torch.tensor([[2.0, 5.0, 0.0], [4.0, 2.0, 0.0]]),
        drift=torch.zeros(2, 3),
    )
    parts = weighted_parts(errors, np.array([1, 0]), 2, np.array([1.0, 0.5, 7.0]))
    assert parts.tolist() == [[0.0, -1.0], [1.0, 1.5]]
