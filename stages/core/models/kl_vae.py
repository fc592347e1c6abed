"""The VAE that Stable Diffusion, SDXL, SD3 and FLUX have: AutoencoderKL, each with its own normalisation."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from stages.core.models.adapter import DiffusionModel
from stages.core.models.loading import ModelError

OTHER_VAE = (
    "Set model.dtype to bfloat16 or float32, or name a VAE that does not overflow as model.vae (of "
    "SDXL's: madebyollin/sdxl-vae-fp16-fix)."
)


def normalisation(vae: Any) -> tuple[Tensor | float, Tensor | float]:
    """(mean, standard deviation) of a VAE's latents, by channel where its config names them.

    Before its scaling factor: latents are (z - mean) / std * scaling_factor. The shift_factor of SD3's and
    FLUX's VAE is such a mean.
    """
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or std is None:
        return vae.config.get("shift_factor") or 0.0, 1.0
    like = {"dtype": vae.dtype, "device": vae.device}
    return (
        torch.tensor(mean, **like).reshape(1, -1, 1, 1),
        torch.tensor(std, **like).reshape(1, -1, 1, 1),
    )


class WithKlVae(DiffusionModel):
    """A model whose images go through an AutoencoderKL."""

    vae_class = AutoencoderKL

    @property
    def vae_factor(self) -> int:
        """Pixels of an image along one pixel of its latents."""
        levels = self.source.config_of("vae", AutoencoderKL).get("block_out_channels", [64])
        if not isinstance(levels, list | tuple) or not 1 <= len(levels) <= 10:
            raise ModelError(
                f"{self.base}: vae/config.json has block_out_channels {levels!r}; expected a list, one number "
                "a level"
            )
        return int(2 ** (len(levels) - 1))

    @torch.no_grad()
    def encode_images(
        self, images: Float[Tensor, "image rgb height width"]
    ) -> Float[Tensor, "image channel latent_height latent_width"]:
        """Scaled latents (the posterior's mode) of images in [-1, 1].

        Differs from the paper: the Diffusion-DPO code samples the posterior; its mode makes an
        encoding a function of the image alone, and the posterior is narrow.
        """
        vae = self._vae()
        posterior = vae.encode(images.to(self.device, vae.dtype)).latent_dist
        mean, std = normalisation(vae)
        normalised = (posterior.mode() - mean) / std * vae.config.scaling_factor
        return self.finite(normalised.to(self.dtype), "the VAE's latents of an image", OTHER_VAE)

    @torch.no_grad()
    def decode_latents(
        self, latents: Float[Tensor, "image channel latent_height latent_width"]
    ) -> Float[Tensor, "image rgb height width"]:
        """Images in [0, 1], float32, on the CPU, of scaled latents."""
        vae = self._vae()
        mean, std = normalisation(vae)
        scaled = latents.to(self.device, vae.dtype) * std / vae.config.scaling_factor + mean
        decoded = self.finite(
            vae.decode(scaled).sample, "the images that the VAE decodes", OTHER_VAE
        )
        return (decoded.float() / 2 + 0.5).clamp(0, 1).cpu()

    def _vae(self) -> AutoencoderKL:
        return self._load("vae", AutoencoderKL)
