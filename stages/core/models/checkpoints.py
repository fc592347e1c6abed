"""What the keys of a single checkpoint file say: its family, and what no weight shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stages.core.errors import UserError

SDXL_KEY = "conditioner.embedders.1.model.ln_final.weight"
"""Only SDXL's checkpoints have a second text encoder under this name."""
TRANSFORMERS = {"joint_blocks.0.": "StableDiffusion3Pipeline", "double_blocks.0.": "FluxPipeline"}
"""Parts of keys by which files are known whose transformer alone is read: the rest comes from model.config."""


class ModelError(UserError):
    """A model that cannot be used; the message names the place, the part and what to do."""


def pipeline_of_checkpoint(path: Path) -> str:
    """Name of diffusers' pipeline class for a checkpoint. ModelError for a file that is none."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is no readable safetensors file: {error}") from error
    for part, pipeline in TRANSFORMERS.items():
        if any(key.removeprefix("model.diffusion_model.").startswith(part) for key in keys):
            return pipeline
    if not any(key.startswith("model.diffusion_model.") for key in keys):
        some = ", ".join(sorted(keys)[:3])
        raise ModelError(
            f"{path} is no whole checkpoint: it has no key model.diffusion_model.* (found: {some} "
            "...). A LoRA or a bare UNet cannot be a base model."
        )
    return "StableDiffusionXLPipeline" if SDXL_KEY in keys else "StableDiffusionPipeline"


def said_by_keys(path: Path) -> dict[str, Any]:
    """What a checkpoint says of its schedule by keys without a value. ModelError for EDM's."""
    with safe_open(path, framework="pt") as file:
        keys = set(file.keys())
    edm = sorted(key for key in keys if key.startswith("edm_"))
    if edm:
        raise ModelError(
            f"{path} holds {', '.join(edm)}: it was trained on EDM's schedule, which no formula here covers"
        )
    said: dict[str, Any] = {"prediction_type": "v_prediction"} if "v_pred" in keys else {}
    if "ztsnr" in keys:
        said |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return said
