"""Text-to-latents sampling with classifier-free guidance, one seed per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from stages.core.method.guidance import guided_steps
from stages.core.method.noising import generator

if TYPE_CHECKING:
    from stages.core.models.adapter import DiffusionModel
    from stages.core.models.conditioning import Conditioning
    from stages.core.models.denoiser import Denoiser


@torch.no_grad()
def sample_latents(
    model: DiffusionModel,
    denoiser: Denoiser,
    *,
    text: Conditioning,
    unconditional: Conditioning,
    seeds: Sequence[int],
    sampler: str,
    num_inference_steps: int,
    guidance_scale: float,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
) -> Float[Tensor, "image ..."]:
    """Latents of one image per row of `text`, from `seeds`; the batch does not matter.

    Equal to diffusers' own pipeline for the same seed, scheduler and guidance: the generator that
    draws an image's first noise also draws its sampler's noise, if the sampler has any.
    `unconditional` is one row, for families that are guided by it. Outside of `guidance_interval`, shares of the
    steps, there is no guidance (Kynkaanniemi et al., "Applying Guidance in a Limited Interval", there of noise
    levels). ModelError for latents that are not finite.
    """
    scheduler = model.sampler(sampler)
    # The sampler's own arithmetic reads its timesteps as numbers: from a GPU, each would wait for it.
    model.set_steps(scheduler, num_inference_steps)
    timesteps = scheduler.timesteps.to(model.device)
    generators = [generator(seed) for seed in seeds]
    noise = torch.stack([torch.randn(model.latents_shape, generator=g) for g in generators])
    latents = noise.to(model.device, model.sampling_dtype) * getattr(
        scheduler, "init_noise_sigma", 1.0
    )
    unconditional = unconditional.repeat(len(seeds))
    extra = model.step_arguments(scheduler, generators)
    guided = guided_steps(len(timesteps), guidance_interval)
    for number, timestep in enumerate(scheduler.timesteps):
        times = timesteps[number].expand(len(latents))
        scale = guidance_scale if number in guided else 1.0
        prediction = model.guided(denoiser, latents, times, text, unconditional, scale)
        latents = scheduler.step(prediction, timestep, latents, **extra).prev_sample
    return model.finite(
        latents,
        "the sampler's latents",
        "Either the policy has diverged (lower its learning_rate or dpo_beta), or model.dtype is too narrow.",
    )
