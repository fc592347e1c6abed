"""Gaussian steps of flow models: by hand, the flow's own marginals, and the pipelines of diffusers with such steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from stages.core.method.flow_steps import FlowSchedule, flow_schedule
from stages.core.method.gaussian_steps import log_probability, log_ratio
from stages.core.method.noising import generator
from stages.core.method.trajectories import Chains, chain_schedule, sample_trajectories
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import Denoiser
from stages.core.models.families import load_model
from stages.core.models.loading import ModelError
from tests.builders import settings
from tests.flow_families import CPU, PROMPTS, Family, flow_families
from tests.flow_models import SD3_SCHEDULER
from tests.tiny_models import with_scheduler


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    return flow_families(tmp_path_factory.mktemp("flow"))


@pytest.fixture(params=["sd3", "flux", "sana"])
def family(request: pytest.FixtureRequest, families: dict[str, Family]) -> Family:
    return families[request.param]


def schedule_of(levels: list[float], noise_level: float) -> FlowSchedule:
    """Steps at these noise levels, which end at 0."""
    each = torch.tensor(levels, dtype=torch.float64)
    told = 1000 * each[:-1]
    return FlowSchedule(told.round().long(), told, each, noise_level)


def test_steps_by_hand() -> None:
    schedule = schedule_of([1.0, 0.5, 0.25, 0.0], 0.7)
    x, v = torch.tensor([[2.0], [2.0], [2.0]]), torch.tensor([[-1.0], [-1.0], [-1.0]])
    step = schedule.step(torch.tensor([0, 1, 2]), v, x)
    # s = 1 to 0.5: sigma^2 = 0.49 / (1 - 0.5) = 0.98; drift -1 + 0.98 / 2 * 2 = -0.02
    # s = 0.5 to 0.25: sigma^2 = 0.49; drift -1 + 0.49 / 1 * (2 - 0.5) = -0.265
    # s = 0.25 to 0: sigma^2 = 0.49 / 3; drift -1 + 0.49 / 3 / 0.5 * (2 - 0.75) = -1 + 0.408333
    expected = [2 + 0.02 * 0.5, 2 + 0.265 * 0.25, 2 + (1 - 0.4083333) * 0.25]
    assert step.mean.flatten().tolist() == pytest.approx(expected, rel=1e-6)
    sigmas = [0.98 * 0.5, 0.49 * 0.25, 0.49 / 3 * 0.25]
    assert step.sigma.tolist() == pytest.approx([each**0.5 for each in sigmas], rel=1e-6)
    assert step.clean.flatten().tolist() == pytest.approx([3.0, 2.5, 2.25])


def test_without_noise_a_step_is_that_of_diffusers_sampler(family: Family) -> None:
    model = family.load()
    schedule = flow_schedule(model, 7, 1e-6)
    theirs = model.sampler("euler")
    model.set_steps(theirs, 7)
    assert torch.equal(schedule.times, theirs.timesteps)
    assert schedule.timesteps[0] == 1000
    shape = (2, *model.latents_shape)
    latents, velocity = (torch.randn(shape, generator=generator(seed)) for seed in (1, 2))
    for number, timestep in enumerate(theirs.timesteps):
        expected = theirs.step(velocity, timestep, latents).prev_sample
        found = schedule.step(torch.full((2,), number), velocity, latents)
        torch.testing.assert_close(found.mean, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0])
def test_the_noise_leaves_the_flow_its_marginals(noise_level: float) -> None:
    """Where images are a normal law of deviation 0.6, whose velocity is known, 4,000 steps keep each variance.

    Not from the first on: near s = 1 sigma has no bound, and no step is short enough.
    """
    levels = torch.linspace(1, 0, 4001, dtype=torch.float64)
    schedule = schedule_of(levels.tolist(), noise_level)
    s = levels[:-1]
    kept = 0.36 * (1 - s).square() + s.square()
    velocity = (s - 0.36 * (1 - s)) / kept  # of x = 1: E[noise - image | x] / x
    ones = torch.ones((4000, 1), dtype=torch.float64)
    step = schedule.step(torch.arange(4000), velocity[:, None], ones)
    variance, found = 1.0, []
    for gain, sigma in zip(step.mean.flatten().tolist(), step.sigma.tolist(), strict=True):
        variance = gain**2 * variance + sigma**2
        found.append(variance)
    after = levels[1:]
    expected = 0.36 * (1 - after).square() + after.square()
    is_later = after < 0.85
    found_later = torch.tensor(found, dtype=torch.float64)[is_later]
    torch.testing.assert_close(found_later, expected[is_later], rtol=0.01, atol=0)


def test_every_step_of_a_published_schedule_has_noise_and_a_probability(family: Family) -> None:
    model = family.load()
    for number in (1, 2, 10, 50):
        schedule = chain_schedule(model, number, 0.7)
        assert len(schedule) == number
        latents = torch.randn((number, *model.latents_shape), generator=generator(1))
        step = schedule.step(torch.arange(number), latents.flip(0), latents)
        assert (step.sigma > 0).all()
        assert step.mean.isfinite().all()
        assert log_probability(latents, step).isfinite().all()


def test_what_is_in_half_precision_is_added_up_in_float32() -> None:
    schedule = schedule_of([1.0, 0.5, 0.0], 0.7)
    x, v = (torch.randn((2, 4, 8, 8), generator=generator(seed)) for seed in (1, 2))
    half = schedule.step(torch.tensor([0, 1]), v.bfloat16(), x)
    whole = schedule.step(torch.tensor([0, 1]), v.bfloat16().float(), x)
    assert half.mean.dtype == half.sigma.dtype == torch.float32
    assert torch.equal(half.mean, whole.mean)


class Stochastic(FlowMatchEulerDiscreteScheduler):
    """Diffusers' scheduler, whose step is that of the paper Flow-GRPO with a = 0.7, written once more."""

    noise: Callable[[], Tensor]
    number = 0

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **_: Any) -> Any:
        t, after = (float(level) for level in self.sigmas[self.number : self.number + 2])
        dt, x, v = after - t, sample.double(), model_output.double()
        root = t if t < 1 else float(self.sigmas[1])
        sigma = 0.7 * (t / (1 - root)) ** 0.5
        drift = v + sigma**2 / (2 * t) * (x + (1 - t) * v)
        self.number += 1
        return ((x + drift * dt + sigma * (-dt) ** 0.5 * self.noise()).float(),)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_chain_is_diffusers_pipeline_with_such_steps(
    family: Family, guidance_scale: float
) -> None:
    model, pipeline = family.load(), family.opened()
    own = {} if family.name == "sana" else pipeline.scheduler.config
    theirs = Stochastic.from_config(own, **({"shift": 3.0} if family.name == "sana" else {}))
    walks = [generator(seed) for seed in (50, 60)]

    def noise() -> Tensor:
        drawn = torch.stack([torch.randn(model.latents_shape, generator=rng) for rng in walks])
        return (
            pipeline._pack_latents(drawn, 2, *drawn.shape[1:]) if family.name == "flux" else drawn
        )

    theirs.noise = noise
    pipeline.scheduler = theirs
    expected = family.drawn(pipeline, num_inference_steps=4, guidance_scale=guidance_scale)
    assert theirs.number == 4
    found = sample_trajectories(
        chains(model, model.load_denoiser(), guidance_scale),
        model.encode_text(PROMPTS[:2]),
        [(5, 50), (6, 60)],
    )
    torch.testing.assert_close(found.latents[:, -1], expected, atol=3e-5, rtol=0)
    assert float(expected.std()) > 0.1


def chains(model: DiffusionModel, denoiser: Denoiser, guidance_scale: float) -> Chains:
    return Chains(
        model=model, denoiser=denoiser, schedule=chain_schedule(model, 4, 0.7),
        unconditional=model.unconditional(), guidance_scale=guidance_scale,
    )  # fmt: skip


def test_the_probabilities_of_a_chain_are_those_of_its_own_policy(family: Family) -> None:
    model = family.load()
    steps = chains(model, model.load_denoiser(), 3.0)
    text = model.encode_text(PROMPTS[:2])
    found = sample_trajectories(steps, text, [(5, 5), (6, 6)])
    for number in range(4):
        numbers = torch.full((2,), number)
        before, after = found.latents[:, number], found.latents[:, number + 1]
        again = steps.step(before, numbers, text)
        assert torch.equal(log_probability(after, again), found.log_probability[:, number])
        assert log_ratio(after, again, again).tolist() == [0.0, 0.0]


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
def test_noise_levels_that_do_not_fall_are_refused(families: dict[str, Family]) -> None:
    base = with_scheduler(families["sd3"].base, SD3_SCHEDULER | {"shift_terminal": 0.1})
    model = load_model(settings(base), device=CPU)
    assert float(flow_schedule(model, 4, 0.7).levels[-2]) == pytest.approx(0.1)
    with pytest.raises(
        ModelError, match="= 1 the noise levels nan, 0, which do not all fall: .* another"
    ):
        flow_schedule(model, 1, 0.7)
    with pytest.raises(ModelError, match="num_inference_steps is 0; it must be at least 1"):
        flow_schedule(model, 0, 0.7)


def test_a_first_level_that_misses_1_by_a_rounding_is_as_1(families: dict[str, Family]) -> None:
    base = with_scheduler(families["sd3"].base, SD3_SCHEDULER | {"shift": 2.61})
    schedule = flow_schedule(load_model(settings(base), device=CPU), 10, 0.7)
    assert 0.999999 < float(schedule.levels[0]) < 1
    step = schedule.step(torch.tensor([0]), torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8))
    assert float(step.sigma) == pytest.approx(0.7, rel=1e-3)
