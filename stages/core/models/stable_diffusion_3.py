"""Stable Diffusion 3 and 3.5: two CLIPs and T5, a multimodal transformer, velocities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from diffusers import SD3Transformer2DModel
from jaxtyping import Float, Num
from torch import Tensor
from torch.nn import functional
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5TokenizerFast,
)

from stages.core.models.conditioning import Conditioning
from stages.core.models.denoiser import Denoiser
from stages.core.models.flow import FlowModel, whole_number
from stages.core.models.kl_vae import WithKlVae
from stages.core.models.loading import ModelError, Source
from stages.core.models.tokens import OTHER_PRECISION, clip_tokens


class StableDiffusion3(FlowModel, WithKlVae):
    """Stable Diffusion 3 medium, 3.5 medium and 3.5 large."""

    denoiser_part = "transformer"
    denoiser_class = SD3Transformer2DModel
    encoder_parts = (
        "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3",
    )  # fmt: skip
    same_in_family = (
        "in_channels", "num_layers", "num_attention_heads", "attention_head_dim", "joint_attention_dim",
    )  # fmt: skip
    family = "stable-diffusion-3"
    has_max_sequence_length = True
    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip
    """Those of diffusers' train_dreambooth_lora_sd3.py, which Flow-GRPO has too."""

    def __init__(self, source: Source, *, device: torch.device) -> None:
        """ModelError for images larger than the transformer has positions for."""
        super().__init__(source, device=device)
        config = source.config_of(self.denoiser_part, self.denoiser_class)
        where = f"{self.base}: transformer/config.json"
        names = (
            "in_channels",
            "sample_size",
            "patch_size",
            "joint_attention_dim",
            "pos_embed_max_size",
        )
        channels, size, self._patch, self._text_width, most = (
            whole_number(config, name, where) for name in names
        )
        height, width = self._latents_size((size, size), self.vae_factor, self._patch)
        self._latents_shape = (channels, height, width)
        if max(height, width) > most * self._patch:
            raise ModelError(
                f"{self.base}: images of {self.image_size[0]} x {self.image_size[1]} pixels (height x width) have "
                f"more patches than the transformer has positions for ({most} a side); lower model.image_size"
            )

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
        return (height // self._patch) * (width // self._patch)

    @property
    def has_t5(self) -> bool:
        """Whether the model has its third text encoder, which may be left out to save memory."""
        value = self.source.index().get("text_encoder_3", [None])
        return isinstance(value, list | tuple) and value[0] is not None

    def encode_now(self, prompts: Sequence[str]) -> Conditioning:
        """Penultimate states of both CLIPs side by side, then T5's states; both CLIPs' pooled text.

        Follows diffusers' StableDiffusion3Pipeline, which also gives zeros for a T5 that is left out.
        """
        states, pooled = [], []
        for suffix in ("", "_2"):
            tokenizer = self._load(f"tokenizer{suffix}", CLIPTokenizer)
            encoder = self._load(f"text_encoder{suffix}", CLIPTextModelWithProjection)
            tokens = clip_tokens(self.base, tokenizer, encoder, prompts).to(self.device)
            output = encoder(tokens, output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled.append(output.text_embeds)
        clip = torch.cat(states, dim=-1)
        clip = functional.pad(clip, (0, self._text_width - clip.shape[-1]))
        text = torch.cat([clip, self._t5_states(prompts).to(clip.dtype)], dim=-2)
        return Conditioning(
            {
                "text": self.finite(text, "the text encoders' states", OTHER_PRECISION),
                "pooled": torch.cat(pooled, dim=-1),
            }
        )

    def _t5_states(self, prompts: Sequence[str]) -> Tensor:
        length = self.source.text_tokens
        if not self.has_t5:
            return torch.zeros(
                (len(prompts), length, self._text_width), dtype=self.dtype, device=self.device
            )
        tokenizer = self._load("tokenizer_3", T5TokenizerFast)
        tokens = tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids  # fmt: skip
        return cast(Tensor, self._load("text_encoder_3", T5EncoderModel)(tokens.to(self.device))[0])

    def predict_at(
        self,
        denoiser: Denoiser,
        latents: Float[Tensor, "row channel height width"],
        times: Num[Tensor, " row"],
        context: Conditioning,
    ) -> Float[Tensor, "row channel height width"]:
        """The velocity that the transformer sees in the latents."""
        output = denoiser(
            latents,
            timestep=times,
            encoder_hidden_states=context["text"],
            pooled_projections=context["pooled"],
        )
        return cast(Tensor, output.sample)
