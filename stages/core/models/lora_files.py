"""LoRA files as diffusers, peft and kohya's scripts write them, read for the denoiser alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from stages.core.models.denoiser import LORA_METADATA

KOHYA = "lora_unet_"
OF_TEXT = ("text_encoder", "lora_te")
"""How keys of a text encoder's part begin, by diffusers and by kohya."""


@dataclass(frozen=True)
class LoraFile:
    """A denoiser's low-rank weights, by diffusers' names."""

    weights: dict[str, Tensor]
    alphas: dict[str, float] | None
    """Of each layer, where the file is kohya's."""
    metadata: dict[str, Any] | None
    """Rank and alpha, where diffusers wrote them into the file's header."""


def read_lora(path: Path, unet_config: Any | None) -> LoraFile:
    """A LoRA's file. ValueError for one that also changes a text encoder.

    With a UNet's config also one of kohya's scripts; without, ValueError for such a one too.
    """
    weights = safetensors.torch.load_file(path)
    if of_text := sorted(key for key in weights if key.startswith(OF_TEXT)):
        raise ValueError(
            f"it also changes a text encoder ({len(of_text)} keys, as {of_text[0]}), which is never trained "
            "here and would be left out. Fuse it into the base (diffusers: load_lora_weights, fuse_lora, "
            "save_pretrained) and adopt that folder as model.base, or train without its text encoder"
        )
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = json.loads((file.metadata() or {}).get(LORA_METADATA, "null"))
    if not is_kohya(weights):
        return LoraFile(weights, None, metadata)
    if unet_config is None:
        raise ValueError(
            "its keys are kohya's, which are read for Stable Diffusion and SDXL alone. Load it with diffusers "
            "(load_lora_weights) and save it with save_lora_weights"
        )
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

    named, alphas = StableDiffusionXLLoraLoaderMixin.lora_state_dict(
        weights, unet_config=unet_config
    )
    return LoraFile(named, alphas, None)


def is_kohya(keys: Iterable[str]) -> bool:
    """Whether a file's keys are those of kohya's scripts, as ComfyUI and A1111 read them."""
    return all(key.startswith(KOHYA) for key in keys)


def is_lora_file(path: Path) -> bool:
    """Whether this is a file of low-rank weights; False for a checkpoint, and for what cannot be read."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            keys = list(file.keys())
    except (safetensors.SafetensorError, OSError):
        return False
    return any("lora" in key for key in keys)
