"""Stable Diffusion XL: two text encoders, pooled text, and the sizes of each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, Num
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from stages.core.models.conditioning import Conditioning
from stages.core.models.denoiser import Denoiser
from stages.core.models.interface import Geometry
from stages.core.models.stable_diffusion import StableDiffusion
from stages.core.models.tokens import OTHER_PRECISION, clip_tokens


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL 1.0 and its fine-tunes."""

    encoder_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    family = "stable-diffusion-xl"
    same_in_family = (
        *StableDiffusion.same_in_family,
        "addition_embed_type",
        "projection_class_embeddings_input_dim",
    )

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """Penultimate hidden states of both encoders side by side, the second one's pooled text.

        Follows diffusers' SDXL pipeline.
        """
        states = []
        for suffix, kind in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
            tokenizer = self._load(f"tokenizer{suffix}", CLIPTokenizer)
            encoder = self._load(f"text_encoder{suffix}", kind)
            tokens = clip_tokens(self.base, tokenizer, encoder, prompts).to(self.device)
            output = encoder(tokens, output_hidden_states=True)
            states.append(output.hidden_states[-2])
        text = self.finite(torch.cat(states, dim=-1), "the text encoders' states", OTHER_PRECISION)
        sizes = self.native_geometry(len(prompts)).to(self.device)
        return Conditioning({"text": text, "pooled": output.text_embeds, "sizes": sizes})

    def unconditional(self) -> Conditioning:
        """Zeros where the model asks for them (as SDXL 1.0 does), else the empty prompt."""
        empty = self.encode_text([""])
        if not self.source.index().get("force_zeros_for_empty_prompt", True):
            return empty
        zeros = {name: torch.zeros_like(empty[name]) for name in ("text", "pooled")}
        return Conditioning({**empty.tensors, **zeros})

    def place(self, conditioning: Conditioning, geometry: Geometry) -> Conditioning:
        """The conditioning with each row's original size, crop and target size."""
        sizes = geometry.to(conditioning["sizes"].device)
        return Conditioning({**conditioning.tensors, "sizes": sizes})

    def predict_at(
        self,
        denoiser: Denoiser,
        latents: Float[Tensor, "row channel height width"],
        times: Num[Tensor, " row"],
        context: Conditioning,
    ) -> Float[Tensor, "row channel height width"]:
        """The noise, or the velocity, that the denoiser sees in the latents."""
        text = context["text"]
        added = {"text_embeds": context["pooled"], "time_ids": context["sizes"].to(text.dtype)}
        output = denoiser(latents, times, encoder_hidden_states=text, added_cond_kwargs=added)
        return cast(Tensor, output.sample)

    def _vae(self) -> AutoencoderKL:
        """In float32 where half precision would overflow, as diffusers does."""
        config = self.source.config_of("vae", AutoencoderKL)
        must_upcast = self.dtype == torch.float16 and config.get("force_upcast", True)
        return self._load("vae", AutoencoderKL, torch.float32 if must_upcast else None)
