"""Denoising errors of two models: exactly equal for one model, the same in any batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stages.core.method.noising import Draws, generator, reward_draws
from stages.core.method.rewards import implicit_reward
from stages.core.method.scoring import Difference, draw_errors
from stages.core.models.adapter import DiffusionModel
from stages.core.models.conditioning import Conditioning
from stages.core.models.denoiser import Denoiser
from stages.core.models.families import load_model
from tests import tiny_models
from tests.builders import CAPTIONS, settings


@pytest.fixture(scope="module")
def draws(model: DiffusionModel) -> Draws:
    """Four draws of the committed pipeline's shape."""
    return reward_draws(
        5, num_draws=4, num_timesteps=model.num_timesteps, latents_shape=model.latents_shape
    )


@pytest.fixture(scope="module")
def latents(model: DiffusionModel) -> torch.Tensor:
    """Latents of three images."""
    return torch.randn((3, *model.latents_shape), generator=generator(1))


@pytest.fixture(scope="module")
def text(model: DiffusionModel) -> Conditioning:
    """One prompt."""
    return model.encode_text([CAPTIONS[0]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_policy_equal_to_reference_has_reward_exactly_0(
    tiny_base: str, latents: torch.Tensor, draws: Draws, dtype: str
) -> None:
    model = load_model(settings(tiny_base, dtype), device=torch.device("cpu"))
    text = model.encode_text([CAPTIONS[0]])
    errors = draw_errors(
        model, Difference(model.load_denoiser(), model.load_denoiser()), latents, text, draws
    )
    assert errors.policy.dtype == torch.float32
    reward = implicit_reward(
        policy_errors=errors.policy.numpy(), reference_errors=errors.reference.numpy()
    )
    assert (reward.reward == 0.0).all()
    assert (errors.drift == 0.0).all()
    assert (errors.policy > 0).all()


def test_errors_do_not_depend_on_which_candidates_are_scored_together(
    model: DiffusionModel,
    base_denoiser: Denoiser,
    other_denoiser: Denoiser,
    latents: torch.Tensor,
    text: Conditioning,
    draws: Draws,
) -> None:
    together = draw_errors(model, Difference(other_denoiser, base_denoiser), latents, text, draws)
    for rows in ([0], [2], [1, 0]):
        found = draw_errors(
            model, Difference(other_denoiser, base_denoiser), latents[rows], text, draws
        )
        for name in ("policy", "reference", "drift"):
            torch.testing.assert_close(
                getattr(found, name), getattr(together, name)[rows], atol=1e-6, rtol=1e-5
            )


@pytest.mark.parametrize("rows_per_batch", [1, 5, 12, 100])
def test_errors_do_not_depend_on_how_many_rows_go_through_the_network_at_once(
    model: DiffusionModel,
    base_denoiser: Denoiser,
    other_denoiser: Denoiser,
    latents: torch.Tensor,
    text: Conditioning,
    draws: Draws,
    rows_per_batch: int,
) -> None:
    judge = Difference(other_denoiser, base_denoiser)
    whole = draw_errors(model, judge, latents, text, draws)
    found = draw_errors(model, judge, latents, text, draws, rows_per_batch=rows_per_batch)
    for name in ("policy", "reference", "drift"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name), atol=1e-6, rtol=1e-5)


def test_both_models_see_the_same_draws(
    model: DiffusionModel,
    base_denoiser: Denoiser,
    other_denoiser: Denoiser,
    latents: torch.Tensor,
    text: Conditioning,
    draws: Draws,
) -> None:
    one = draw_errors(model, Difference(other_denoiser, base_denoiser), latents, text, draws)
    turned = draw_errors(model, Difference(base_denoiser, other_denoiser), latents, text, draws)
    assert torch.equal(one.policy, turned.reference)
    assert torch.equal(one.reference, turned.policy)
    assert torch.equal(one.drift, turned.drift)
    assert not torch.equal(one.policy, one.reference)


def test_errors_and_drift_equal_a_loop_over_images_and_draws(
    model: DiffusionModel,
    base_denoiser: Denoiser,
    other_denoiser: Denoiser,
    latents: torch.Tensor,
    text: Conditioning,
    draws: Draws,
) -> None:
    found = draw_errors(model, Difference(other_denoiser, base_denoiser), latents, text, draws)
    alphas = model.sampler("ddpm").alphas_cumprod.double().numpy()
    for image in range(3):
        for draw in range(4):
            noise, step = draws.noise[draw].double().numpy(), int(draws.timesteps[draw])
            noised = np.sqrt(alphas[step]) * latents[image].double().numpy()
            noised = noised + np.sqrt(1 - alphas[step]) * noise
            row = torch.tensor(noised, dtype=torch.float32)[None]
            with torch.no_grad():
                policy, reference = (
                    unet(row, step, encoder_hidden_states=text["text"]).sample[0].double().numpy()
                    for unet in (other_denoiser, base_denoiser)
                )
            expected = (((noise - p) ** 2).mean() for p in (policy, reference))
            assert found.policy[image, draw].item() == pytest.approx(next(expected), rel=1e-4)
            assert found.reference[image, draw].item() == pytest.approx(next(expected), rel=1e-4)
            drift = ((policy - reference) ** 2).mean()
            assert found.drift[image, draw].item() == pytest.approx(drift, rel=1e-3)


def test_a_velocity_models_errors_are_those_of_the_velocity(tmp_path: Path) -> None:
    """v = sqrt(alpha) noise - sqrt(1 - alpha) x_0 (Salimans and Ho, Sec. 4), and not the noise."""
    base = tiny_models.sd15(tmp_path, prediction_type="v_prediction")
    model = load_model(settings(base, "float32"), device=torch.device("cpu"))
    denoiser, text = model.load_denoiser(), model.encode_text(["a cat"])
    draws = reward_draws(
        5, num_draws=4, num_timesteps=model.num_timesteps, latents_shape=model.latents_shape
    )
    latents = torch.randn((1, *model.latents_shape), generator=generator(1))
    found = draw_errors(model, Difference(denoiser, denoiser), latents, text, draws)
    for draw, step in enumerate(draws.timesteps.tolist()):
        alpha = float(model.sampler("ddpm").alphas_cumprod[step])
        noise = draws.noise[draw]
        noised = alpha**0.5 * latents[0] + (1 - alpha) ** 0.5 * noise
        velocity = alpha**0.5 * noise - (1 - alpha) ** 0.5 * latents[0]
        with torch.no_grad():
            made = denoiser.network(noised[None], step, encoder_hidden_states=text["text"]).sample
        expected = (made[0] - velocity).square().mean().item()
        assert found.policy[0, draw].item() == pytest.approx(expected, rel=1e-4)
        assert (made[0] - noise).square().mean().item() != pytest.approx(expected, rel=1e-2)
