"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, epsilon or v prediction."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from stages.core.models.adapter import SAMPLERS, DiffusionModel, Geometry
from stages.core.models.conditioning import Conditioning
from stages.core.models.denoiser import Denoiser
from stages.core.models.loading import ModelError, Source
from stages.core.models.tokens import num_truncated

log = logging.getLogger(__name__)

PREDICTIONS = ("epsilon", "v_prediction")


class StableDiffusion(DiffusionModel):
    """Stable Diffusion 1.x and 2.x."""

    denoiser_part = "unet"
    denoiser_class = UNet2DConditionModel
    encoder_parts: tuple[str, ...] = ("text_encoder", "tokenizer")
    same_in_family: tuple[str, ...] = ("in_channels", "cross_attention_dim", "block_out_channels")

    def __init__(self, source: Source, *, device: torch.device) -> None:
        """ModelError if the model predicts something that no formula here covers."""
        super().__init__(source, device=device)
        self._schedule = source.read("scheduler", DDPMScheduler)
        self.prediction_type = self._schedule.config.prediction_type
        if self.prediction_type not in PREDICTIONS:
            raise ModelError(
                f"{self.base}: scheduler/scheduler_config.json has prediction_type "
                f"{self.prediction_type!r}; supported are {', '.join(PREDICTIONS)}"
            )
        config = source.config_of("unet", UNet2DConditionModel)
        self._latents_shape = (config["in_channels"], config["sample_size"], config["sample_size"])

    @property
    def num_timesteps(self) -> int:
        """Length of the noise schedule."""
        return int(self._schedule.config.num_train_timesteps)

    @property
    def latents_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents of one image at the model's own size."""
        return self._latents_shape

    @property
    def image_size(self) -> int:
        """Width and height in pixels of the images this model makes."""
        config = self.source.config_of("vae", AutoencoderKL)
        return int(self._latents_shape[-1] * 2 ** (len(config["block_out_channels"]) - 1))

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Last hidden states of each prompt, cut to the text encoder's length."""
        tokenizer = self._load("tokenizer", CLIPTokenizer)
        encoder = self._load("text_encoder", CLIPTextModel)
        tokens = self._tokens(tokenizer, encoder, prompts)
        return Conditioning({"text": encoder(tokens)[0]})

    def unconditional(self) -> Conditioning:
        """The empty prompt."""
        return self.encode_text([""])

    def num_truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts are longer than the text encoder reads."""
        return num_truncated(self._load("tokenizer", CLIPTokenizer), prompts)

    def place(self, conditioning: Conditioning, geometry: Geometry) -> Conditioning:
        """The conditioning as it is: this family is told nothing of an image's size."""
        return conditioning

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
        return cast(Tensor, (posterior.mode() * vae.config.scaling_factor).to(self.dtype))

    @torch.no_grad()
    def decode_latents(
        self, latents: Float[Tensor, "image channel latent_height latent_width"]
    ) -> Float[Tensor, "image rgb height width"]:
        """Images in [0, 1], float32, on the CPU, of scaled latents."""
        vae = self._vae()
        scaled = latents.to(self.device, vae.dtype) / vae.config.scaling_factor
        decoded = vae.decode(scaled).sample
        return cast(Tensor, (decoded.float().cpu() / 2 + 0.5).clamp(0, 1))

    def add_noise(
        self,
        latents: Float[Tensor, "row channel height width"],
        noise: Float[Tensor, "row channel height width"],
        timesteps: Int[Tensor, " row"],
    ) -> Float[Tensor, "row channel height width"]:
        """The latents noised to their timesteps. Paper: SAIL Eq. 5, q_t(x_0)."""
        return cast(Tensor, self._schedule.add_noise(latents, noise, timesteps))

    def target(
        self,
        latents: Float[Tensor, "row channel height width"],
        noise: Float[Tensor, "row channel height width"],
        timesteps: Int[Tensor, " row"],
    ) -> Float[Tensor, "row channel height width"]:
        """The noise, or the velocity of a v-prediction model.

        Differs from the paper: it knows epsilon prediction only; with v the same errors are taken
        in v's space, as diffusers' DPO script does.
        """
        if self.prediction_type == "epsilon":
            return noise
        return cast(Tensor, self._schedule.get_velocity(latents, noise, timesteps))

    def predict(
        self,
        denoiser: Denoiser,
        latents: Float[Tensor, "row channel height width"],
        timesteps: Int[Tensor, " row"],
        context: Conditioning,
    ) -> Float[Tensor, "row channel height width"]:
        """The noise, or the velocity, that the denoiser sees in the latents."""
        return cast(
            Tensor, denoiser(latents, timesteps, encoder_hidden_states=context["text"]).sample
        )

    def sampler(self, name: str) -> DDPMScheduler | DDIMScheduler:
        """A fresh sampler, on this model's noise schedule. ValueError for an unknown name."""
        if name not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, found {name!r}")
        return self.source.read("scheduler", SAMPLERS[name])

    def step_arguments(
        self, scheduler: DDPMScheduler | DDIMScheduler, generators: list[torch.Generator]
    ) -> dict[str, Any]:
        """What this sampler's step wants besides prediction, timestep and latents."""
        if isinstance(scheduler, DDIMScheduler):
            return {"eta": 0.0}
        return {"generator": generators}

    def _vae(self) -> AutoencoderKL:
        return self._load("vae", AutoencoderKL)

    def _tokens(self, tokenizer: Any, encoder: Any, prompts: Sequence[str]) -> Tensor:
        """Token ids, cut to the encoder's length. ModelError for a tokenizer of another model."""
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        config = encoder.config
        if len(tokenizer) > config.vocab_size or (
            tokenizer.model_max_length > config.max_position_embeddings
        ):
            raise ModelError(
                f"{self.base}: the tokenizer has {len(tokenizer)} words and reads "
                f"{tokenizer.model_max_length} tokens, the text encoder knows {config.vocab_size} "
                f"and {config.max_position_embeddings}; they belong to different models"
            )
        return cast(Tensor, tokens.to(self.device))
