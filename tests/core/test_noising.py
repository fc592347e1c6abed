"""Draws of timestep and noise: their strata, their mean, and that a seed decides them."""

from __future__ import annotations

import pytest
import torch

from stages.core.method.noising import generator, reward_draws, stratified_timesteps, training_draws

SHAPE = (4, 2, 2)


@pytest.mark.parametrize(("num_draws", "num_timesteps"), [(10, 1000), (7, 1000), (3, 3), (1, 50)])
def test_each_bin_holds_exactly_one_timestep(num_draws: int, num_timesteps: int) -> None:
    lower = torch.arange(num_draws) * num_timesteps / num_draws
    upper = (torch.arange(num_draws) + 1) * num_timesteps / num_draws
    for seed in range(300):
        found = stratified_timesteps(num_draws, num_timesteps, generator(seed))
        assert found.shape == (num_draws,)
        assert ((found >= lower.floor()) & (found < upper)).all(), seed
        assert found.max() < num_timesteps


def test_mean_timestep_over_seeds_is_the_middle_of_the_range() -> None:
    draws = torch.stack([stratified_timesteps(10, 1000, generator(s)) for s in range(2000)])
    # uniform on 0 ... 999: mean 499.5; in a bin of 100 the deviation is 28.9 over 2000 seeds
    assert draws.double().mean().item() == pytest.approx(499.5, abs=1.0)
    middles = torch.arange(10) * 100 + 49.5
    torch.testing.assert_close(draws.double().mean(0), middles.double(), atol=3.0, rtol=0)


def test_reward_draws_of_one_seed_are_equal_and_of_two_seeds_differ() -> None:
    options = {"num_draws": 5, "num_timesteps": 1000, "latents_shape": SHAPE}
    first, again, other = (reward_draws(seed, **options) for seed in (3, 3, 4))
    assert torch.equal(first.timesteps, again.timesteps)
    assert torch.equal(first.noise, again.noise)
    assert not torch.equal(first.noise, other.noise)
    assert first.noise.shape == (5, *SHAPE)


def test_training_draws_give_each_pair_one_timestep_and_one_noise() -> None:
    first, again = (
        training_draws(9, num_pairs=6, num_timesteps=1000, latents_shape=SHAPE) for _ in range(2)
    )
    assert first.timesteps.shape == (6,)
    assert first.timesteps.dtype == torch.int64
    assert first.noise.shape == (6, *SHAPE)
    assert torch.equal(first.noise, again.noise)
    assert torch.equal(first.timesteps, again.timesteps)
    different = {noise.numpy().tobytes() for noise in first.noise}
    assert len(different) == 6
    assert len(set(first.timesteps.tolist())) > 1


def test_training_timesteps_cover_the_whole_range_evenly() -> None:
    draws = training_draws(0, num_pairs=20_000, num_timesteps=10, latents_shape=(1, 1, 1))
    counts = torch.bincount(draws.timesteps, minlength=10)
    assert len(counts) == 10
    assert ((counts - 2000).abs() < 5 * 43).all()  # a binomial deviation is 42.4


def test_logit_normal_timesteps_follow_the_law() -> None:
    draws = training_draws(
        0, num_pairs=20_000, num_timesteps=1000, latents_shape=(1, 1, 1), law="logit_normal"
    )
    share = (draws.timesteps.double() + 0.5) / 1000
    normal = torch.logit(share)
    assert normal.mean().item() == pytest.approx(0, abs=5 / 20_000**0.5)
    assert normal.std().item() == pytest.approx(1, abs=5 / 40_000**0.5)
    # 68.27 % lie within sigmoid(-1) and sigmoid(1)
    inside = ((share > 0.26894) & (share < 0.73106)).double().mean()
    assert inside.item() == pytest.approx(0.6827, abs=5 * (0.6827 * 0.3173 / 20_000) ** 0.5)


def test_logit_normal_strata_are_equally_likely_parts() -> None:
    quartiles = [0.0, 0.33747, 0.5, 0.66253, 1.0]  # sigmoid of -0.67449, 0, 0.67449
    for seed in range(20):
        found = stratified_timesteps(4, 1000, generator(seed), "logit_normal")
        for timestep, low, high in zip(found.tolist(), quartiles[:-1], quartiles[1:], strict=True):
            assert 1000 * low - 1 <= timestep < 1000 * high + 1


def test_noise_is_standard_normal() -> None:
    noise = reward_draws(0, num_draws=200, num_timesteps=1000, latents_shape=(4, 8, 8)).noise
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
