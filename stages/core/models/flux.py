"""FLUX.1: CLIP's pooled text and T5, latents packed into patches, guidance told to the denoiser."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from jaxtyping import Float, Num
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from stages.core.models.conditioning import Conditioning
from stages.core.models.denoiser import Denoiser
from stages.core.models.flow import FlowModel, whole_number
from stages.core.models.kl_vae import WithKlVae
from stages.core.models.loading import ModelError, Source
from stages.core.models.tokens import OTHER_PRECISION, clip_tokens

OWN_SIZE = 128
"""Side of the latents that diffusers' pipeline makes unless it is told another; no config names one."""
PATCH = 2
"""Side of a patch of latents."""
UNGUIDED = 1.0
"""The guidance that the denoiser is told unless another is asked for: about the conditional velocity."""


class Flux(FlowModel, WithKlVae):
    """FLUX.1-dev; FLUX.1-schnell for sampling only."""

    denoiser_part = "transformer"
    denoiser_class = FluxTransformer2DModel
    encoder_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    same_in_family = (
        "in_channels", "num_layers", "num_single_layers", "num_attention_heads", "joint_attention_dim",
        "guidance_embeds",
    )  # fmt: skip
    family = "flux"
    has_max_sequence_length = True
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip
    """The attention projections of diffusers' train_dreambooth_lora_flux.py."""

    def __init__(self, source: Source, *, device: torch.device) -> None:
        """ModelError for a transformer whose channels are no patches."""
        super().__init__(source, device=device)
        config = source.config_of(self.denoiser_part, self.denoiser_class)
        channels = whole_number(config, "in_channels", f"{self.base}: transformer/config.json")
        if channels % PATCH**2:
            raise ModelError(
                f"{self.base}: transformer/config.json has in_channels {channels}; expected a multiple of "
                f"{PATCH**2}, the latents of a patch"
            )
        size = self._latents_size((OWN_SIZE, OWN_SIZE), self.vae_factor, PATCH)
        self._latents_shape = (channels // PATCH**2, *size)
        self.is_told_guidance = bool(config.get("guidance_embeds"))

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
        """Patches of an image, by which a dynamic shift goes."""
        _, height, width = self._latents_shape
        return (height // PATCH) * (width // PATCH)

    def check_trainable(self) -> None:
        """ModelError for FLUX.1-schnell."""
        if not self.is_told_guidance:
            raise ModelError(
                f"{self.base} has no guidance embedding: it is FLUX.1-schnell or made from it, distilled to jump "
                "to an image in a few steps. Its error at most noise levels says nothing of an image, so neither "
                "a reward nor a loss means anything. Train FLUX.1-dev"
            )

    def autocast(self) -> AbstractContextManager[Any]:
        """Where float32 weights are trained with `dtype` arithmetic; nothing for float32.

        Its norms of queries and keys then meet inputs of half precision, which torch has no fused kernel for.
        """
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)
        return super().autocast()

    def encode_now(self, prompts: Sequence[str]) -> Conditioning:
        """T5's states, CLIP's pooled text, and the guidance 1. Follows diffusers' FluxPipeline."""
        tokenizer = self._load("tokenizer", CLIPTokenizer)
        encoder = self._load("text_encoder", CLIPTextModel)
        tokens = clip_tokens(self.base, tokenizer, encoder, prompts).to(self.device)
        pooled = encoder(tokens).pooler_output
        tokenizer = self._load("tokenizer_2", T5TokenizerFast)
        tokens = tokenizer(
            list(prompts), padding="max_length", max_length=self.source.text_tokens, truncation=True,
            return_tensors="pt",
        ).input_ids  # fmt: skip
        text = self._load("text_encoder_2", T5EncoderModel)(tokens.to(self.device))[0]
        context = Conditioning(
            {
                "text": self.finite(text, "the text encoder's states", OTHER_PRECISION),
                "pooled": pooled,
            }
        )
        return self.tell_guidance(context, UNGUIDED)

    def tell_guidance(self, context: Conditioning, guidance: float) -> Conditioning:
        """The conditioning with the guidance that FLUX.1-dev is told; as it is for a model that is told none."""
        if not self.is_told_guidance:
            return context
        told = torch.full((len(context),), guidance, device=context["text"].device)
        return Conditioning({**context.tensors, "guidance": told})

    def guided(
        self,
        denoiser: Denoiser,
        latents: Float[Tensor, "row channel height width"],
        times: Num[Tensor, " row"],
        text: Conditioning,
        unconditional: Conditioning,
        guidance_scale: float,
    ) -> Float[Tensor, "row channel height width"]:
        """What a sampler's step goes by: one prediction, which is told the guidance."""
        return self.predict_at(denoiser, latents, times, self.tell_guidance(text, guidance_scale))

    def set_steps(self, scheduler: Any, num_inference_steps: int) -> None:
        """Spread a sampler's steps over the noise schedule: evenly down to 1/n before the shift."""
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        scheduler.set_timesteps(sigmas=sigmas, mu=self.dynamic_shift)

    def predict_at(
        self,
        denoiser: Denoiser,
        latents: Float[Tensor, "row channel height width"],
        times: Num[Tensor, " row"],
        context: Conditioning,
    ) -> Float[Tensor, "row channel height width"]:
        """The velocity that the transformer sees in the latents, which it is given in patches."""
        rows, channels, height, width = latents.shape
        high, wide = height // PATCH, width // PATCH
        patches = latents.reshape(rows, channels, high, PATCH, wide, PATCH).permute(
            0, 2, 4, 1, 3, 5
        )
        device = latents.device  # a copy from the CPU would wait for the device at each call
        rows_and_columns = torch.meshgrid(
            torch.arange(high, device=device), torch.arange(wide, device=device), indexing="ij"
        )
        places = torch.stack([torch.zeros((high, wide), device=device), *rows_and_columns], dim=-1)
        output = denoiser(
            patches.reshape(rows, high * wide, channels * PATCH**2),
            timestep=times.to(latents.dtype) / 1000,
            guidance=context["guidance"] if self.is_told_guidance else None,
            pooled_projections=context["pooled"],
            encoder_hidden_states=context["text"],
            txt_ids=torch.zeros((context["text"].shape[1], 3), device=device),
            img_ids=places.reshape(high * wide, 3),
        )
        velocity = output.sample.reshape(rows, high, wide, channels, PATCH, PATCH)
        return cast(Tensor, velocity.permute(0, 3, 1, 4, 2, 5).reshape(latents.shape))
