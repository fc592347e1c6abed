"""Stable Diffusion 3's attention with text in which one token stands for many equal ones.

A model without T5 is given zeros for its tokens: 256 by diffusers' default, fewer if it is told so. Equal
tokens stay equal through all blocks, so that one token counted n times gives the same as n of them.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


class CountedText:
    """Joint attention of image and text that adds `attention_mask` to what each query sees in each key."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "row image_token channel"],
        encoder_hidden_states: Float[Tensor, "row text_token channel"],
        attention_mask: Float[Tensor, "row 1 1 token"] | None = None,
    ) -> tuple[Float[Tensor, "row image_token channel"], Float[Tensor, "row text_token channel"]]:
        """What image and text take from each other: diffusers' JointAttnProcessor2_0, but for the mask."""
        image, text = hidden_states, encoder_hidden_states
        query, key, value = (
            torch.cat(
                [_heads(attn, of_image, norm, image), _heads(attn, of_text, text_norm, text)], dim=2
            )
            for of_image, norm, of_text, text_norm in (
                (attn.to_q, attn.norm_q, attn.add_q_proj, attn.norm_added_q),
                (attn.to_k, attn.norm_k, attn.add_k_proj, attn.norm_added_k),
                (attn.to_v, None, attn.add_v_proj, None),
            )
        )
        seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        seen = seen.transpose(1, 2).flatten(2)
        for_image, for_text = seen[:, : image.shape[1]], seen[:, image.shape[1] :]
        if not attn.context_pre_only:
            for_text = attn.to_add_out(for_text)
        return attn.to_out[0](for_image), for_text


def _heads(
    attn: Any, linear: Any, norm: Any, tokens: Float[Tensor, "row token channel"]
) -> Float[Tensor, "row head token head_channel"]:
    split = linear(tokens).unflatten(2, (attn.heads, -1)).transpose(1, 2)
    return split if norm is None else norm(split)


def velocity(
    transformer: SD3Transformer2DModel,
    latents: Float[Tensor, "row channel height width"],
    times: Float[Tensor, " row"],
    text: Float[Tensor, "row token channel"],
    pooled: Float[Tensor, "row width"],
    zeros: Int[Tensor, " row"],
) -> Float[Tensor, "row channel height width"]:
    """What the transformer predicts where each row's text is followed by so many zeros, one at least.

    Its attention must be `CountedText`.
    """
    patches = (latents.shape[-2] * latents.shape[-1]) // transformer.config.patch_size**2
    bias = functional.pad(zeros.float().log()[:, None], (patches + text.shape[1], 0))
    output = transformer(
        latents,
        timestep=times,
        encoder_hidden_states=functional.pad(text, (0, 0, 0, 1)),
        pooled_projections=pooled,
        joint_attention_kwargs={"attention_mask": bias[:, None, None]},
    )
    return output.sample
