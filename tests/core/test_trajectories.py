"""One Gaussian step: diffusers' DDIM with eta = 1, probabilities against torch.distributions in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from stages.core.method.gaussian_steps import (
    DdimSchedule,
    Step,
    ddim_schedule,
    log_probability,
    log_ratio,
)
from stages.core.method.noising import generator
from stages.core.method.trajectories import Chains, sample_trajectories
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import Denoiser
from stages.core.models.families import load_model
from stages.core.models.loading import ModelError
from tests.builders import CAPTIONS, settings
from tests.tiny_models import SD15_SCHEDULER, sd15, with_scheduler

SHAPE = (4, 8, 8)


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def published(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> DiffusionModel:
    """A tiny SD1.5 with the published scheduler: its last step ends at timestep 0, not at no noise."""
    folder = tmp_path_factory.mktemp("sd15")
    return load_model(
        settings(sd15(folder, prediction_type=request.param)), device=torch.device("cpu")
    )


def random(seed: int, rows: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((rows, *SHAPE), generator=generator(seed), dtype=dtype)


def diffusers_scheduler(model: DiffusionModel, **changes: Any) -> DDIMScheduler:
    scheduler = model.sampler("ddim")
    return DDIMScheduler.from_config({**scheduler.config, **changes})


@pytest.mark.parametrize("num_steps", [3, 20, 50])
def test_every_step_is_that_of_diffusers_ddim_with_eta_1(
    published: DiffusionModel, num_steps: int
) -> None:
    schedule = ddim_schedule(published, num_steps)
    theirs = diffusers_scheduler(published)
    theirs.set_timesteps(num_steps)
    assert schedule.timesteps.tolist() == theirs.timesteps.tolist()
    latents, prediction, noise = random(1), random(2), random(3)
    for number, timestep in enumerate(theirs.timesteps):
        expected = theirs.step(prediction, timestep, latents, eta=1.0, variance_noise=noise)
        found = schedule.step(torch.full((3,), number), prediction, latents)
        after = found.mean + found.sigma.reshape(-1, 1, 1, 1) * noise
        torch.testing.assert_close(after, expected.prev_sample, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(found.clean, expected.pred_original_sample, rtol=1e-4, atol=1e-4)


def test_rows_may_stand_at_different_steps(published: DiffusionModel) -> None:
    schedule = ddim_schedule(published, 20)
    latents, prediction = random(1), random(2)
    numbers = torch.tensor([0, 11, 19])
    together = schedule.step(numbers, prediction, latents)
    for row, number in enumerate(numbers.tolist()):
        part = slice(row, row + 1)
        alone = schedule.step(torch.tensor([number]), prediction[part], latents[part])
        torch.testing.assert_close(together.mean[part], alone.mean, rtol=0, atol=0)
        torch.testing.assert_close(together.sigma[part], alone.sigma, rtol=0, atol=0)


def test_the_noise_of_sd15_in_20_steps_by_hand(published: DiffusionModel) -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(dim=0)
    schedule = ddim_schedule(published, 20)
    assert schedule.timesteps[[0, -1]].tolist() == [951, 1]
    for number, (now, after) in {0: (951, 901), 19: (1, 0)}.items():
        variance = (1 - kept[after]) / (1 - kept[now]) * (1 - kept[now] / kept[after])
        step = schedule.step(torch.tensor([number]), random(1, 1), random(2, 1))
        assert float(step.sigma) == pytest.approx(float(variance.sqrt()), rel=1e-4)
    assert float(step.sigma) == pytest.approx(0.0206, abs=1e-4)


def test_the_last_step_is_gaussian_also_where_diffusers_ends_without_noise(
    model: DiffusionModel,
) -> None:
    assert model.sampler("ddim").config.set_alpha_to_one
    schedule = ddim_schedule(model, 4)
    latents, prediction = random(1), random(2)
    last = schedule.step(torch.full((3,), 3), prediction, latents)
    assert (last.sigma > 0).all()
    other = diffusers_scheduler(model, set_alpha_to_one=False)
    other.set_timesteps(4)
    noise = random(3)
    expected = other.step(prediction, other.timesteps[-1], latents, eta=1.0, variance_noise=noise)
    after = last.mean + last.sigma.reshape(-1, 1, 1, 1) * noise
    torch.testing.assert_close(after, expected.prev_sample, rtol=1e-4, atol=2e-5)


def test_clean_latents_are_clipped_where_the_model_asks_for_it(published: DiffusionModel) -> None:
    plain = ddim_schedule(published, 20)
    schedule = DdimSchedule(
        plain.timesteps, plain.signal, plain.signal_after, plain.prediction_type, clip=1.0
    )
    theirs = diffusers_scheduler(published, clip_sample=True, clip_sample_range=1.0)
    theirs.set_timesteps(20)
    latents, prediction, noise = 3 * random(1), random(2), random(3)
    expected = theirs.step(prediction, theirs.timesteps[4], latents, eta=1.0, variance_noise=noise)
    found = schedule.step(torch.full((3,), 4), prediction, latents)
    if plain.prediction_type == "epsilon":
        after = found.mean + found.sigma.reshape(-1, 1, 1, 1) * noise
        torch.testing.assert_close(after, expected.prev_sample, rtol=1e-4, atol=2e-5)
    assert found.clean.abs().max() == 1.0
    torch.testing.assert_close(found.clean, expected.pred_original_sample, rtol=1e-4, atol=1e-4)


def test_probabilities_equal_torch_distributions_in_float64() -> None:
    sample = random(1, dtype=torch.float64)
    sigma = torch.tensor([0.02, 0.3, 0.9], dtype=torch.float64)
    policy, reference = (
        Step(
            sample + 0.1 * sigma.reshape(-1, 1, 1, 1) * random(seed, dtype=torch.float64),
            sigma,
            sample,
        )
        for seed in (2, 3)
    )
    found = {}
    for name, step in (("policy", policy), ("reference", reference)):
        normal = torch.distributions.Normal(step.mean, sigma.reshape(-1, 1, 1, 1))
        found[name] = normal.log_prob(sample).flatten(start_dim=1).mean(dim=1)
        torch.testing.assert_close(
            log_probability(sample, step), found[name], rtol=1e-12, atol=1e-12
        )
    torch.testing.assert_close(
        log_ratio(sample, policy, reference),
        found["policy"] - found["reference"],
        rtol=1e-9,
        atol=1e-12,
    )


def test_the_ratio_of_a_policy_to_itself_is_1_and_exchanging_them_flips_the_sign() -> None:
    sample, sigma = random(1), torch.tensor([0.02, 0.3, 0.9])
    policy, reference = (Step(random(seed), sigma, sample) for seed in (2, 3))
    assert log_ratio(sample, policy, policy).tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(
        log_ratio(sample, policy, reference),
        -log_ratio(sample, reference, policy),
        rtol=1e-5,
        atol=0,
    )


def chains(
    model: DiffusionModel, denoiser: Denoiser, guidance_scale: float, steps: int = 4
) -> Chains:
    return Chains(
        model=model, denoiser=denoiser, schedule=ddim_schedule(model, steps),
        unconditional=model.unconditional(), guidance_scale=guidance_scale,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(64, 4), (4, 2, 4, 8)])
def test_latents_of_any_rank_take_the_same_steps(
    published: DiffusionModel, shape: tuple[int, ...]
) -> None:
    schedule = ddim_schedule(published, 20)
    numbers = torch.tensor([0, 11, 19])
    images = [random(seed) for seed in (1, 2, 3, 4)]
    others = [latents.reshape(3, *shape) for latents in images]

    def measured(latents: list[Tensor]) -> list[Tensor]:
        sample, prediction, other, after = latents
        step = schedule.step(numbers, prediction, sample)
        reference = schedule.step(numbers, other, sample)
        return [step.mean.flatten(start_dim=1), step.sigma, log_probability(after, step),
                log_ratio(after, step, reference)]  # fmt: skip

    for found, expected in zip(measured(others), measured(images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_chain_is_diffusers_pipeline_with_ddim_and_eta_1(
    model: DiffusionModel, base_denoiser: Denoiser, tiny_base: str, guidance_scale: float
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers_scheduler(model, set_alpha_to_one=False)
    prompts, seeds = CAPTIONS[:3], [11, 12, 13]
    expected = pipeline(
        prompts,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        eta=1.0,
        generator=[generator(seed) for seed in seeds],
        output_type="latent",
    ).images
    found = sample_trajectories(
        chains(model, base_denoiser, guidance_scale),
        model.encode_text(prompts),
        [(seed, seed) for seed in seeds],
    )
    assert found.latents.shape == (3, 5, *model.latents_shape)
    torch.testing.assert_close(found.latents[:, -1], expected, atol=2e-5, rtol=1e-5)


def test_a_chain_does_not_depend_on_its_batch_and_shares_first_noise_where_the_seed_does(
    model: DiffusionModel, base_denoiser: Denoiser
) -> None:
    steps = chains(model, base_denoiser, 3.0)
    seeds = [(1, 1), (1, 2), (3, 4)]
    text = model.encode_text(CAPTIONS[:3])
    together = sample_trajectories(steps, text, seeds)
    alone = sample_trajectories(steps, text.rows(torch.tensor([1])), seeds[1:2])
    torch.testing.assert_close(alone.latents[0], together.latents[1], atol=1e-4, rtol=0)
    assert torch.equal(together.latents[0, 0], together.latents[1, 0])
    assert not torch.equal(together.latents[0, 0], together.latents[2, 0])
    assert not torch.allclose(together.latents[0, 1], together.latents[1, 1])


def test_the_probabilities_of_a_chain_are_those_of_its_own_policy(
    model: DiffusionModel, base_denoiser: Denoiser, other_denoiser: Denoiser
) -> None:
    steps = chains(model, base_denoiser, 3.0)
    text = model.encode_text(CAPTIONS[:2])
    found = sample_trajectories(steps, text, [(5, 5), (6, 6)])
    for number in range(4):
        numbers = torch.full((2,), number)
        before, after = found.latents[:, number], found.latents[:, number + 1]
        again = steps.step(before, numbers, text)
        other = steps.of(other_denoiser).step(before, numbers, text)
        assert torch.equal(log_probability(after, again), found.log_probability[:, number])
        assert (log_ratio(after, other, again) != 0).all()


@pytest.fixture(scope="module")
def base_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd15(tmp_path_factory.mktemp("scheduled"))


def scheduled(base: Path, **changes: Any) -> DiffusionModel:
    """A tiny SD1.5 with DDIM's config of these changes."""
    config = SD15_SCHEDULER | {"_class_name": "DDIMScheduler"} | changes
    return load_model(settings(with_scheduler(base, config)), device=torch.device("cpu"))


@pytest.mark.parametrize(
    "changes", [{"steps_offset": 0}, {"timestep_spacing": "linspace", "steps_offset": 0}]
)
def test_a_schedule_whose_last_step_has_no_noise_is_refused(
    base_of_its_own: Path, changes: dict[str, Any]
) -> None:
    model = scheduled(base_of_its_own, **changes)
    with pytest.raises(
        ModelError, match="step at timestep 0, after which nothing .* steps_offset 1"
    ):
        ddim_schedule(model, 20)


@pytest.mark.parametrize(
    "changes", [{"steps_offset": 1}, {"timestep_spacing": "trailing", "steps_offset": 0}]
)
def test_every_step_of_a_schedule_has_noise(base_of_its_own: Path, changes: dict[str, Any]) -> None:
    schedule = ddim_schedule(scheduled(base_of_its_own, **changes), 20)
    latents = random(1, 20)
    step = schedule.step(torch.arange(20), random(2, 20), latents)
    assert (step.sigma > 0).all()
    assert log_probability(latents, step).isfinite().all()


def test_thresholding_is_refused(base_of_its_own: Path) -> None:
    with pytest.raises(
        ModelError, match="has thresholding, .*online methods need thresholding false"
    ):
        ddim_schedule(scheduled(base_of_its_own, thresholding=True), 4)


@pytest.mark.parametrize("number", [0, 1000, 1001])
def test_more_steps_than_the_schedule_has_room_for_are_refused(
    model: DiffusionModel, number: int
) -> None:
    for sampler in ("ddpm", "ddim"):
        with pytest.raises(ModelError, match=rf"num_inference_steps is {number}, .* take 1 to 999"):
            model.set_steps(model.sampler(sampler), number)
    with pytest.raises(ModelError, match="take 1 to 999"):
        ddim_schedule(model, number)
    assert len(ddim_schedule(model, 999)) == 999
    assert int(ddim_schedule(model, 999).timesteps[0]) == 999
