"""Chains of Gaussian steps from noise to an image, and how probable each step was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.core.method.flow_steps import flow_schedule
from stages.core.method.gaussian_steps import (
    Latents,
    Schedule,
    Step,
    beside,
    ddim_schedule,
    log_probability,
)
from stages.core.method.noising import generator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stages.core.models.adapter import DiffusionModel
    from stages.core.models.conditioning import Conditioning
    from stages.core.models.denoiser import Denoiser


def chain_schedule(model: DiffusionModel, num_inference_steps: int, noise_level: float) -> Schedule:
    """Gaussian steps as a model's kind has them: of DDIM with eta = 1, or of flow matching with this much noise.

    ModelError where the model's own noise schedule has none.
    """
    if "ddim" in model.samplers:
        return ddim_schedule(model, num_inference_steps)
    return flow_schedule(model, num_inference_steps, noise_level)


@dataclass(frozen=True, kw_only=True)
class Chains:
    """Whose steps are taken: a denoiser with guidance on a schedule."""

    model: DiffusionModel
    denoiser: Denoiser
    schedule: Schedule
    unconditional: Conditioning
    """One row."""
    guidance_scale: float

    def step(self, latents: Latents, numbers: Int[Tensor, " row"], text: Conditioning) -> Step:
        """What each row's step, numbered from 0, makes of its latents; `text` has a row for each."""
        times = self.schedule.times[numbers.cpu()].to(latents.device)
        with self.model.autocast():
            prediction = self.model.guided(
                self.denoiser, latents, times, text,
                self.unconditional.repeat(len(latents)), self.guidance_scale,
            )  # fmt: skip
        return self.schedule.step(numbers, prediction, latents)

    def of(self, denoiser: Denoiser) -> Chains:
        """The same chains of another denoiser."""
        return Chains(
            model=self.model, denoiser=denoiser, schedule=self.schedule,
            unconditional=self.unconditional, guidance_scale=self.guidance_scale,
        )  # fmt: skip


def first_noise(
    model: DiffusionModel, generators: Sequence[torch.Generator]
) -> Float[Tensor, "chain ..."]:
    """What chains begin with, float32, one generator of the CPU for each."""
    noise = [torch.randn(model.latents_shape, generator=rng) for rng in generators]
    return torch.stack(noise).to(model.device)


@dataclass(frozen=True)
class Trajectories:
    """Whole chains, on the CPU in float32."""

    latents: Float[Tensor, "chain moment ..."]
    """Before every step, and after the last."""
    log_probability: Float[Tensor, "chain step"]
    """Of each step under the policy that took it."""


@torch.no_grad()
def sample_trajectories(
    chains: Chains, text: Conditioning, seeds: Sequence[tuple[int, int]]
) -> Trajectories:
    """Chains of (seed of the first noise, seed of the steps' noise), one for each row of `text`.

    Where both seeds of a chain are equal, one generator draws its first noise and then that of its steps, as
    diffusers' pipeline does.
    """
    model = chains.model
    starts = [generator(first) for first, _ in seeds]
    walks = [
        start if first == then else generator(then)
        for start, (first, then) in zip(starts, seeds, strict=True)
    ]
    latents = first_noise(model, starts)
    moments, probabilities = [latents.cpu()], []
    for number in range(len(chains.schedule)):
        step = chains.step(latents, torch.full((len(latents),), number), text)
        latents = step.mean + beside(step.sigma, latents) * first_noise(model, walks)
        probabilities.append(log_probability(latents, step).cpu())
        moments.append(latents.cpu())
    return Trajectories(torch.stack(moments, dim=1), torch.stack(probabilities, dim=1))
