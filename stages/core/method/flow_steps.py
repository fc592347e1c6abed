"""Gaussian steps of flow matching: the stochastic equation that has the flow's own marginals.

Liu et al., "Flow-GRPO: Training Flow Matching Models via Online RL": their update rule by Euler and Maruyama.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.core.method.gaussian_steps import Latents, Schedule, Step, beside
from stages.core.models.loading import ModelError

if TYPE_CHECKING:
    from stages.core.models.adapter import DiffusionModel


@dataclass(frozen=True)
class FlowSchedule(Schedule):
    """The steps of the stochastic equation."""

    timesteps: Int[Tensor, " step"]
    told: Float[Tensor, " step"]
    """What the denoiser is told at each step: the noise level on the model's scale."""
    levels: Float[Tensor, " moment"]
    """Noise levels s before every step, and 0 after the last: the noise's share."""
    noise_level: float
    """How much noise a step adds (a of sigma = a sqrt(s / (1 - s))), above 0."""

    @property
    def times(self) -> Float[Tensor, " step"]:
        """See `Schedule`."""
        return self.told

    def step(self, numbers: Int[Tensor, " row"], prediction: Latents, latents: Latents) -> Step:
        """See `Schedule`; the prediction is the velocity v, noise minus image.

        mean = x + (v + sigma^2 / (2 s) (x + (1 - s) v)) ds and standard deviation sigma sqrt(-ds), with
        sigma = a sqrt(s / (1 - s)). At s = 1, where sigma has no bound, the next level stands in its place
        below the root. The last step, to s = 0, has noise like the others. Both as in the published code.
        """
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        before, after, below = (
            beside(values[numbers.cpu()].to(latents.device), latents)
            for values in (self.levels[:-1], self.levels[1:], self._below_the_root)
        )
        pull = self.noise_level**2 / (1 - below)  # sigma^2 / s
        sigma = (pull * before * (before - after)).sqrt()
        s, half, length = (values.to(dtype) for values in (before, pull / 2, before - after))
        x, velocity = latents.to(dtype), prediction.to(dtype)
        noise = x + (1 - s) * velocity
        mean = x - (velocity + half * noise) * length
        return Step(mean, sigma.flatten().to(dtype), x - s * velocity)

    @property
    def _below_the_root(self) -> Float[Tensor, " step"]:
        """Noise levels by which sigma is had: below 1, for a shift in float32 may miss 1 by a rounding."""
        return torch.where(self.levels[:-1] > 1 - 1e-6, self.levels[1:], self.levels[:-1])


def flow_schedule(
    model: DiffusionModel, num_inference_steps: int, noise_level: float
) -> FlowSchedule:
    """The steps of a model of flow matching on its own noise schedule, on the CPU, in float64.

    They lie where the sampler 'euler' has them. ModelError for no step, and for noise levels that do not fall.
    """
    if num_inference_steps < 1:
        raise ModelError(f"num_inference_steps is {num_inference_steps}; it must be at least 1")
    scheduler = model.sampler("euler")
    model.set_steps(scheduler, num_inference_steps)
    levels, told = scheduler.sigmas.double().cpu(), scheduler.timesteps.float().cpu()
    if not (levels.diff() < 0).all():
        found = ", ".join(f"{level:.4g}" for level in levels.tolist())
        raise ModelError(
            f"{model.base}: scheduler/scheduler_config.json gives num_inference_steps = {num_inference_steps} the "
            f"noise levels {found[:200]}, which do not all fall: a step has no probability then. Take another number "
            "of steps"
        )
    return FlowSchedule(
        timesteps=told.round().long(), told=told, levels=levels, noise_level=noise_level
    )
