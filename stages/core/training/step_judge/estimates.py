"""Finished images as a model sees them at a timestep: what a step-aware preference model is shown."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from stages.core.artifacts.images import to_pixels
from stages.core.method.gaussian_steps import clean_estimate
from stages.core.models.adapter import DiffusionModel
from stages.core.models.conditioning import Conditioning
from stages.core.models.denoiser import Denoiser
from stages.core.models.loading import ModelError

Latents = Float[Tensor, "row ..."]
Images = UInt8[np.ndarray, "row height width rgb"]


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """The base's estimates of the clean latents of noised images, decoded."""

    model: DiffusionModel
    denoiser: Denoiser
    unconditional: Conditioning
    """One row."""
    guidance_scale: float
    signal: Float[Tensor, " timestep"]
    """Share of the variance that is the image's at each timestep, float64."""
    prediction_type: str
    clip: float | None

    @classmethod
    def of(
        cls, model: DiffusionModel, unconditional: Conditioning, guidance_scale: float
    ) -> Estimates:
        """By the base of a model. ModelError for one whose noise is not that of DDIM."""
        refuse_other_noise(model)
        scheduler = model.sampler("ddim")
        clip = float(scheduler.config.clip_sample_range) if scheduler.config.clip_sample else None
        return cls(
            model=model,
            denoiser=model.load_denoiser(),
            unconditional=unconditional,
            guidance_scale=guidance_scale,
            signal=scheduler.alphas_cumprod.double(),
            prediction_type=str(scheduler.config.prediction_type),
            clip=clip,
        )

    @torch.no_grad()
    def seen(
        self,
        latents: Latents,
        noise: Latents,
        timesteps: Int[Tensor, " row"],
        text: Conditioning,
    ) -> Images:
        """8-bit images of the estimates that are made of latents, noised to each row's timestep."""
        model = self.model
        device = model.device
        latents, noise = (values.to(device, model.dtype) for values in (latents, noise))
        timesteps = timesteps.to(device)
        noised = model.add_noise(latents, noise, timesteps)
        prediction = model.guided(
            self.denoiser, noised, timesteps, text.to(device),
            self.unconditional.repeat(len(noised)), self.guidance_scale,
        )  # fmt: skip
        signal = self.signal.to(device)[timesteps]
        clean, _ = clean_estimate(noised, prediction, signal, self.prediction_type, self.clip)
        return self.finished(clean)

    def finished(self, latents: Latents) -> Images:
        """8-bit images of clean latents."""
        return np.stack(to_pixels(self.model.decode_latents(latents).numpy()))


def refuse_other_noise(model: DiffusionModel) -> None:
    """ModelError for a model of flow matching, where timesteps and their estimates are others."""
    if "ddim" not in model.samplers:
        raise ModelError(
            f"{model.base}: step_judge.clip is set, but a step-aware preference model is trained on what DDIM "
            f"sees at a timestep, which models of {model.family} do not have. Leave step_judge.clip out, or take a "
            "model of Stable Diffusion 1, 2 or XL"
        )
