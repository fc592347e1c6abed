"""A model that breaks off in the middle of a training, as a power cut would."""

from __future__ import annotations

import torch
from torch import Tensor

from stages.core.models.loading import Source
from stages.core.models.stable_diffusion import StableDiffusion
from tests.builders import settings


class Interrupted(RuntimeError):
    """The power cut."""


class FailingModel(StableDiffusion):
    """A model that stops at its `stop_at`-th batch, of training or of scoring."""

    stop_at = 0
    calls = 0

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.stop_at:
            raise Interrupted
        return super().add_noise(latents, noise, timesteps)


def failing(base: str, stop_at: int) -> FailingModel:
    """The model in `base`, which breaks off at its `stop_at`-th batch; -1 is never."""
    model = FailingModel(Source(settings(base)), device=torch.device("cpu"))
    model.stop_at = stop_at
    return model
