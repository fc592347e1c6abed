"""Writes a model's parts as one checkpoint in the original key layout, as ComfyUI users have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch

from stages.core.models.original_layout import checkpoint


def write(pipeline: Any, path: Path) -> Path:
    """The pipeline's UNet, VAE and text encoders in one safetensors file."""
    second = getattr(pipeline, "text_encoder_2", None)
    state = checkpoint(
        pipeline.unet.state_dict(),
        pipeline.unet.config,
        pipeline.vae.state_dict(),
        pipeline.text_encoder.state_dict(),
        None if second is None else second.state_dict(),
    )
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, path)
    return path
