"""Diffusion models behind one small interface: encode, noise, predict, decode.

Every line that knows one model family lives in its adapter; a new family is a new module here and a
line in `ADAPTERS`.
"""

from __future__ import annotations

import torch

from stages.core.models.adapter import DiffusionModel
from stages.core.models.loading import ModelError, ModelSettings, Source
from stages.core.models.stable_diffusion import StableDiffusion
from stages.core.models.stable_diffusion_xl import StableDiffusionXL

ADAPTERS: dict[str, type[DiffusionModel]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
}
"""The adapter of each pipeline class that a model's model_index.json can name."""


def load_model(settings: ModelSettings, *, device: torch.device) -> DiffusionModel:
    """The adapter for a model, in whose arithmetic this process goes on.

    ModelError if it is of a family that has none.
    """
    use_arithmetic(settings)
    source = Source(settings)
    family = source.pipeline_class()
    if family not in ADAPTERS:
        raise ModelError(
            f"{settings.base} is a {family}; supported are {', '.join(ADAPTERS)}. A new family is "
            "one adapter in stages/core/models."
        )
    return ADAPTERS[family](source, device=device)


def use_arithmetic(settings: ModelSettings) -> None:
    """Say to torch whether it may multiply in TF32; by itself it does so in convolutions."""
    is_allowed = settings.dtype == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = is_allowed
