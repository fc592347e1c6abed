"""The random flow models as a test meets them: our adapter, and diffusers' own pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, SanaPipeline, StableDiffusion3Pipeline

from stages.core.method.noising import generator
from stages.core.models.adapter import DiffusionModel
from stages.core.models.families import load_model
from stages.core.models.flux import Flux
from stages.core.models.sana import Sana
from stages.core.models.stable_diffusion_3 import StableDiffusion3
from tests import flow_models
from tests.builders import settings

CPU = torch.device("cpu")
PROMPTS = ["a cat in a hat", "Gandalf, oil on canvas, 4k, by Rembrandt", ""]


@dataclass(frozen=True)
class Family:
    """A model family, with what diffusers itself calls it."""

    name: str
    base: Path
    adapter: type[DiffusionModel]
    pipeline: Any
    sampler: str
    size: tuple[int, int] | None = None
    """Of images, where the model names none."""
    left_out: dict[str, None] = field(default_factory=dict)
    """Parts that diffusers must be told are not there."""

    def load(self, dtype: str = "float32", **changes: Any) -> DiffusionModel:
        """The adapter on the CPU."""
        model = settings(self.base, dtype, **{"image_size": self.size, **changes})
        return load_model(model, device=CPU)

    def opened(self) -> Any:
        """Diffusers' own pipeline."""
        pipeline = self.pipeline.from_pretrained(self.base, local_files_only=True, **self.left_out)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def drawn(self, pipeline: Any, size: tuple[int, int] = (64, 64), **how: Any) -> torch.Tensor:
        """Latents of two prompts by a pipeline, in our shape."""
        height, width = size
        extra = {"use_resolution_binning": False} if self.name == "sana" else {}
        found = pipeline(
            PROMPTS[:2], generator=[generator(5), generator(6)], output_type="latent",
            height=height, width=width, **how, **extra,
        ).images  # fmt: skip
        if self.name == "flux":
            found = pipeline._unpack_latents(found, height, width, pipeline.vae_scale_factor)
        return found


def flow_families(folder: Path) -> dict[str, Family]:
    """Random models of three kinds, as folders."""
    return {
        "sd3": Family(
            "sd3", flow_models.sd3(folder / "sd3"), StableDiffusion3, StableDiffusion3Pipeline, "euler"
        ),
        "flux": Family(
            "flux", flow_models.flux(folder / "flux"), Flux, FluxPipeline, "euler", (64, 64)
        ),
        "sana": Family("sana", flow_models.sana(folder / "sana"), Sana, SanaPipeline, "dpm"),
    }  # fmt: skip
