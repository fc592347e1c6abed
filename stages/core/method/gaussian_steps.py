"""One step of a sampler whose noise is Gaussian, and how probable a step is under a policy.

Diffusion as a chain of decisions: Black et al., "Training Diffusion Models with Reinforcement Learning"
(DDPO), Eq. 4. The steps of DDIM with eta = 1 are here, those of flow matching in `flow_steps`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from stages.core.models.loading import ModelError

if TYPE_CHECKING:
    from stages.core.models.adapter import DiffusionModel

Latents = Float[Tensor, "row ..."]
PerRow = Float[Tensor, " row"]


def beside(values: PerRow, latents: Latents) -> Latents:
    """One value a row in a shape that multiplies latents of any rank."""
    return values.reshape(-1, *[1] * (latents.ndim - 1))


@dataclass(frozen=True)
class Step:
    """The Gaussian that a denoiser's prediction makes of the latents after a step, row by row."""

    mean: Latents
    sigma: PerRow
    """Its standard deviation in every dimension; above 0 at every step."""
    clean: Latents
    """What the denoiser takes the clean latents for (x0-hat)."""


class Schedule(ABC):
    """The steps of a chain, from noise to an image."""

    timesteps: Int[Tensor, " step"]
    """Falling: how noisy the latents are before each step, in whole numbers."""

    @property
    def times(self) -> Num[Tensor, " step"]:
        """The same as the denoiser is told of it."""
        return self.timesteps

    def __len__(self) -> int:
        return len(self.timesteps)

    @abstractmethod
    def step(self, numbers: Int[Tensor, " row"], prediction: Latents, latents: Latents) -> Step:
        """What each row's latents become by its step, numbered from 0, where the denoiser predicts this.

        In float32 at least.
        """


@dataclass(frozen=True)
class DdimSchedule(Schedule):
    """The steps of DDIM with eta = 1."""

    timesteps: Int[Tensor, " step"]
    signal: Float[Tensor, " step"]
    """Share of the image's variance that is kept before each step (abar_t), from 0 to 1."""
    signal_after: Float[Tensor, " step"]
    """The same after it."""
    prediction_type: str
    """What the denoiser returns: 'epsilon' or 'v_prediction'."""
    clip: float | None
    """Bound of the clean latents; None for most models."""

    def step(self, numbers: Int[Tensor, " row"], prediction: Latents, latents: Latents) -> Step:
        """See `Schedule`.

        mean = sqrt(a') x0 + sqrt(1 - a' - sigma^2) eps and sigma^2 = (1 - a')/(1 - a) (1 - a/a'), with a and a' the
        signal before and after. Song et al., "Denoising Diffusion Implicit Models", Eq. 12 and 16 with eta = 1.
        """
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        kept, after = (
            beside(values[numbers.cpu()].to(latents.device), latents)
            for values in (self.signal, self.signal_after)
        )
        sigma = ((1 - after) / (1 - kept) * (1 - kept / after)).sqrt()
        along = (1 - after - sigma.square()).clamp(min=0).sqrt()
        clean, noise = clean_estimate(
            latents, prediction, kept.flatten(), self.prediction_type, self.clip
        )
        mean = after.sqrt().to(dtype) * clean + along.to(dtype) * noise
        return Step(mean, sigma.flatten().to(dtype), clean)


def ddim_schedule(model: DiffusionModel, num_inference_steps: int) -> DdimSchedule:
    """The steps of DDIM on a model's own noise schedule, on the CPU, in float64.

    After the last step the latents are as clean as those of timestep 0, and not entirely: the last step is
    Gaussian like the others. ModelError for a model whose sampler has no such steps, or whose schedule ends
    where nothing is left to denoise: its last step would have no noise, and so no density.
    Differs from diffusers: its last step has no noise where the config has set_alpha_to_one. The published
    code of DDPO and SPO does as this.
    """
    scheduler = model.sampler("ddim")
    if scheduler.config.thresholding:
        raise ModelError(
            f"{model.base}: scheduler/scheduler_config.json has thresholding, by which a step is not DDIM's and its "
            "probability is not known; online methods need thresholding false"
        )
    model.set_steps(scheduler, num_inference_steps)
    kept = scheduler.alphas_cumprod.double()
    timesteps = scheduler.timesteps.long()
    after = (timesteps - model.num_timesteps // num_inference_steps).clamp(min=0)
    is_still = kept[after] <= kept[timesteps]
    if is_still.any():
        raise ModelError(
            f"{model.base}: scheduler/scheduler_config.json has timestep_spacing "
            f"{scheduler.config.timestep_spacing!r} and steps_offset {scheduler.config.steps_offset}, by which "
            f"num_inference_steps = {num_inference_steps} take a step at timestep {int(timesteps[is_still][0])}, after "
            "which nothing is left to denoise; online methods need steps_offset 1 or trailing spacing"
        )
    return DdimSchedule(
        timesteps=timesteps,
        signal=kept[timesteps],
        signal_after=kept[after],
        prediction_type=str(scheduler.config.prediction_type),
        clip=float(scheduler.config.clip_sample_range) if scheduler.config.clip_sample else None,
    )


def clean_estimate(
    latents: Latents,
    prediction: Latents,
    signal: PerRow,
    prediction_type: str,
    clip: float | None,
) -> tuple[Latents, Latents]:
    """(clean latents, noise) that a denoiser which predicts this takes noised latents for; in float32 at least.

    `signal` is the share of the variance that is the image's in each row (abar_t); `prediction_type` 'epsilon' or
    'v_prediction'; `clip` bounds the clean latents. Song et al., "Denoising Diffusion Implicit Models", Eq. 9.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    kept = beside(signal, latents)
    root, rest = kept.sqrt().to(dtype), (1 - kept).sqrt().to(dtype)
    noisy, predicted = latents.to(dtype), prediction.to(dtype)
    if prediction_type == "epsilon":
        clean, noise = (noisy - rest * predicted) / root, predicted
    else:
        clean, noise = root * noisy - rest * predicted, root * predicted + rest * noisy
    return clean if clip is None else clean.clamp(-clip, clip), noise


def log_probability(sample: Latents, step: Step) -> PerRow:
    """Mean over all dimensions but the row of the log-density of what came out of a step; nats a dimension.

    Differs from DDPO's Eq. 4: it sums. Its code takes this mean, which its clip range belongs to.
    """
    scaled = (sample - step.mean) / beside(step.sigma, sample)
    density = -0.5 * scaled.square().flatten(start_dim=1).mean(dim=1)
    return density - step.sigma.log() - 0.5 * math.log(2 * math.pi)


def log_ratio(sample: Latents, policy: Step, reference: Step) -> PerRow:
    """How much likelier the policy makes what came out of a step (log p_policy - log p_reference).

    In the units of `log_probability`. Exactly 0 where the two are equal: the difference of the squares is
    taken apart before it is rounded.
    """
    product = (policy.mean - reference.mean) * (2 * sample - policy.mean - reference.mean)
    return product.flatten(start_dim=1).mean(dim=1) / (2 * policy.sigma.square())
