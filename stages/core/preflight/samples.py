"""What a model is tried on: two prompts, pairs of noise, the config's LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stages.core.method.noising import generator
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import LoraSettings
from stages.core.models.loading import ModelSettings
from stages.core.policies.encoding import EncodedPairs

PROMPTS = ("a photo of a cat", "an oil painting of a ship in a storm")


def model_settings(config: Mapping[str, Any]) -> ModelSettings:
    """The config's block model."""
    size = config["model"]["image_size"]
    return ModelSettings(**{**config["model"], "image_size": size and tuple(size)})


def lora_settings(config: Mapping[str, Any]) -> LoraSettings:
    """The config's block lora."""
    block = config["lora"]
    return LoraSettings(
        rank=block["rank"],
        alpha=float(block["alpha"]),
        target_modules=tuple(block["target_modules"]),
    )


def encode_samples(model: DiffusionModel) -> None:
    """Where text encoders are large: encode what is asked for here, and forget them before a denoiser is loaded."""
    model.encode_ahead([PROMPTS[:1], PROMPTS[1:], [PROMPTS[0], ""]])


def random_pairs(model: DiffusionModel, number: int) -> EncodedPairs:
    """Pairs of noise, as large as real ones."""
    latents = torch.randn((2, number, *model.latents_shape), generator=generator(3))
    return EncodedPairs(
        winner=latents[0],
        loser=latents[1],
        caption=torch.zeros(number, dtype=torch.int64),
        text=model.encode_text([PROMPTS[0], ""]),
        winner_geometry=model.native_geometry(number),
        loser_geometry=model.native_geometry(number),
    )
