"""Denoising errors of a policy and a reference on the same noised images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.core.method.noising import Draws
from stages.core.method.objective import denoising_error
from stages.core.models.adapter import DiffusionModel
from stages.core.models.conditioning import Conditioning
from stages.core.models.denoiser import Denoiser


@dataclass(frozen=True)
class Errors:
    """Errors of both models, and how far their predictions are apart."""

    policy: Float[Tensor, "image draw"]
    reference: Float[Tensor, "image draw"]
    drift: Float[Tensor, "image draw"]
    """Mean squared difference of the two predictions."""


class Judge(ABC):
    """What knows a policy's and its reference's errors on noised rows."""

    @abstractmethod
    def errors(
        self,
        model: DiffusionModel,
        noised: Float[Tensor, "row ..."],
        timesteps: Int[Tensor, " row"],
        context: Conditioning,
        target: Float[Tensor, "row ..."],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(policy's errors, reference's errors, mean squared difference of predictions) of each row."""


@dataclass(frozen=True)
class Difference(Judge):
    """Both models predict, one after the other. Paper: SAIL Eq. 8, as it stands."""

    policy: Denoiser
    reference: Denoiser

    def errors(
        self,
        model: DiffusionModel,
        noised: Float[Tensor, "row ..."],
        timesteps: Int[Tensor, " row"],
        context: Conditioning,
        target: Float[Tensor, "row ..."],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(policy's errors, reference's errors, mean squared difference of predictions) of each row."""
        policy, reference = (
            model.predict(denoiser, noised, timesteps, context)
            for denoiser in (self.policy, self.reference)
        )
        return (
            denoising_error(policy, target),
            denoising_error(reference, target),
            denoising_error(policy, reference),
        )


def about_the_middle(
    middle: Float[Tensor, "row ..."],
    difference: Float[Tensor, "row ..."],
    target: Float[Tensor, "row ..."],
) -> tuple[Tensor, Tensor, Tensor]:
    """(policy's errors, reference's errors, mean squared difference of predictions) of each row.

    `middle` is the mean of the two models' predictions, `difference` the policy's minus the reference's.
    |middle + difference/2 - target|^2 is taken apart, so that the two errors' difference is never rounded.
    """
    half = (difference * (middle.float() - target.float())).flatten(start_dim=1).mean(dim=1)
    drift = difference.square().flatten(start_dim=1).mean(dim=1)
    both = denoising_error(middle, target) + drift / 4
    return both + half, both - half, drift


@torch.no_grad()
def draw_errors(
    model: DiffusionModel,
    judge: Judge,
    latents: Float[Tensor, "image ..."],
    text: Conditioning,
    draws: Draws,
    *,
    rows_per_batch: int | None = None,
) -> Errors:
    """Errors of every image of one prompt at every draw, float32 on the CPU.

    `text` is one row for all images, or one for each. Both models see the same noised rows, without
    guidance; `rows_per_batch` of images x draws go through at once, None is all.
    Paper: SAIL Eq. 8.
    """
    num_images, num_draws = len(latents), len(draws.timesteps)
    timesteps = draws.timesteps.to(model.device).repeat(num_images)
    noise = torch.cat([draws.noise.to(model.device)] * num_images)
    rows = latents.to(model.device, noise.dtype).repeat_interleave(num_draws, dim=0)
    noised = model.add_noise(rows, noise, timesteps).to(model.dtype)  # noised in float32
    context = (text.repeat(num_images) if len(text) == 1 else text).repeat_each(num_draws)
    target = model.target(rows, noise, timesteps)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    size = rows_per_batch or len(rows)
    for part in (slice(start, start + size) for start in range(0, len(rows), size)):
        some = context.rows(torch.arange(len(rows))[part])
        found.append(judge.errors(model, noised[part], timesteps[part], some, target[part]))
    shape = (num_images, num_draws)
    return Errors(*(torch.cat(e).reshape(shape).cpu() for e in zip(*found, strict=True)))
