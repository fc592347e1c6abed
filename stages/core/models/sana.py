"""Sana: Gemma reads the prompt below an instruction, a deep autoencoder, a linear transformer, velocities."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from jaxtyping import Float, Num
from torch import Tensor
from transformers import Gemma2Model, GemmaTokenizerFast

from stages.core.models.conditioning import Conditioning
from stages.core.models.denoiser import Denoiser
from stages.core.models.flow import FlowModel, whole_number
from stages.core.models.kl_vae import OTHER_VAE
from stages.core.models.loading import ModelError, Source
from stages.core.models.tokens import OTHER_PRECISION

TOKENS = 300
"""Tokens of a prompt that the transformer is given: diffusers' pipeline's."""
INSTRUCTION = "\n".join(
    inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
)
"""What diffusers' pipeline writes before each prompt (Xie et al., "SANA": complex human instruction)."""


class Sana(FlowModel):
    """Sana of 0.6 and 1.6 billion parameters, and Sana 1.5."""

    denoiser_part = "transformer"
    denoiser_class = SanaTransformer2DModel
    vae_class = AutoencoderDC
    encoder_parts = ("text_encoder", "tokenizer")
    same_in_family = (
        "in_channels", "num_layers", "num_attention_heads", "attention_head_dim", "caption_channels",
    )  # fmt: skip
    family = "sana"
    samplers = ("dpm", "euler", "euler_stochastic")
    lora_targets = ("to_q", "to_k", "to_v")
    """Those of diffusers' train_dreambooth_lora_sana.py."""

    def __init__(self, source: Source, *, device: torch.device) -> None:
        """ModelError for a transformer that also predicts variances."""
        super().__init__(source, device=device)
        config = source.config_of(self.denoiser_part, self.denoiser_class)
        where = f"{self.base}: transformer/config.json"
        names = ("in_channels", "out_channels", "sample_size", "patch_size")
        channels, out, size, patch = (whole_number(config, name, where) for name in names)
        if channels != out:
            raise ModelError(
                f"{where} has in_channels {channels} and out_channels {out}; expected one number for both"
            )
        self._time_scale = float(config.get("timestep_scale", 1.0))
        self._latents_shape = (channels, *self._latents_size((size, size), self.vae_factor, patch))

    @property
    def vae_factor(self) -> int:
        """Pixels of an image along one pixel of its latents."""
        levels = self.source.config_of("vae", AutoencoderDC).get(
            "encoder_block_out_channels", [0] * 6
        )
        return int(2 ** (len(levels) - 1))

    @property
    def latents_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents of one image."""
        return self._latents_shape

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images this model makes."""
        _, height, width = self._latents_shape
        return height * self.vae_factor, width * self.vae_factor

    @property
    def image_tokens(self) -> int:
        """Patches of an image."""
        _, height, width = self._latents_shape
        return height * width

    @property
    def sampling_dtype(self) -> torch.dtype:
        """Latents stay in float32 between steps, as in diffusers' SanaPipeline."""
        return torch.float32

    def encode_now(self, prompts: Sequence[str]) -> Conditioning:
        """Gemma's states of each prompt below the instruction, of its first token and the last ones.

        Follows diffusers' SanaPipeline. An empty prompt stands alone, as what guidance moves away from does there.
        """
        rows = [self._encode(prompt, INSTRUCTION if prompt else "") for prompt in prompts]
        names = rows[0].tensors
        return Conditioning({name: torch.cat([row[name] for row in rows]) for name in names})

    def _encode(self, prompt: str, instruction: str) -> Conditioning:
        tokenizer = self._tokenizer()
        length = TOKENS + (len(tokenizer.encode(instruction)) - 2 if instruction else 0)
        tokens = tokenizer(
            [instruction + prompt.lower().strip()],
            padding="max_length", max_length=length, truncation=True, return_tensors="pt",
        ).to(self.device)  # fmt: skip
        mask = tokens.attention_mask
        states = self._load("text_encoder", Gemma2Model)(tokens.input_ids, attention_mask=mask)[0]
        kept = [0, *range(-TOKENS + 1, 0)]
        text = self.finite(states[:, kept], "the text encoder's states", OTHER_PRECISION)
        return Conditioning({"text": text, "mask": mask[:, kept]})

    def _tokenizer(self) -> Any:
        tokenizer = self._load("tokenizer", GemmaTokenizerFast)
        tokenizer.padding_side = "right"
        return tokenizer

    @torch.no_grad()
    def encode_images(
        self, images: Float[Tensor, "image rgb height width"]
    ) -> Float[Tensor, "image channel latent_height latent_width"]:
        """Scaled latents of images in [-1, 1]."""
        vae = self._load("vae", AutoencoderDC)
        latents = vae.encode(images.to(self.device, vae.dtype)).latent * vae.config.scaling_factor
        return self.finite(latents.to(self.dtype), "the VAE's latents of an image", OTHER_VAE)

    @torch.no_grad()
    def decode_latents(
        self, latents: Float[Tensor, "image channel latent_height latent_width"]
    ) -> Float[Tensor, "image rgb height width"]:
        """Images in [0, 1], float32, on the CPU, of scaled latents."""
        vae = self._load("vae", AutoencoderDC)
        scaled = latents.to(self.device, vae.dtype) / vae.config.scaling_factor
        decoded = self.finite(
            vae.decode(scaled).sample, "the images that the VAE decodes", OTHER_VAE
        )
        return (decoded.float() / 2 + 0.5).clamp(0, 1).cpu()

    def predict_at(
        self,
        denoiser: Denoiser,
        latents: Float[Tensor, "row channel height width"],
        times: Num[Tensor, " row"],
        context: Conditioning,
    ) -> Float[Tensor, "row channel height width"]:
        """The velocity that the transformer sees in the latents."""
        text = context["text"]
        output = denoiser(
            latents.to(text.dtype),
            encoder_hidden_states=text,
            encoder_attention_mask=context["mask"],
            timestep=times * self._time_scale,
        )
        return cast(Tensor, output.sample.to(latents.dtype))

    def sampler(self, name: str) -> Any:
        """A fresh sampler, on this model's noise schedule; 'dpm' is the published multistep solver's."""
        if name != "dpm":
            return super().sampler(name)
        own = self._own_schedule
        return DPMSolverMultistepScheduler(
            num_train_timesteps=self.num_timesteps, prediction_type="flow_prediction",
            use_flow_sigmas=True, flow_shift=own.get("shift", 1.0),
        )  # fmt: skip
