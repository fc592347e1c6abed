"""What decides a step-aware preference model, and what is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from stages.core.errors import UserError
from stages.core.models.denoiser import Denoiser
from stages.core.training.optimizers import OptimizerName

HELD_OUT_TIMESTEPS = (0, 251, 501, 701, 951)
"""At which held-out pairs are judged; 0 is the finished image. Published code: spm_task.py."""


@dataclass(frozen=True, kw_only=True)
class StepJudgeSettings:
    """Everything about the training that changes the model. Defaults: the published code, for SD1.5."""

    num_steps: int = 8000
    """Optimizer steps (SD1.5: 8,000, SDXL: 7,000)."""
    batch_pairs: int = 64
    """Pairs of an optimizer step (16 on each of 4 GPUs)."""
    learning_rate: float = 3e-6
    """At its highest (SD1.5: 3e-6, SDXL: 1e-6)."""
    warmup_steps: int = 500
    """Steps over which the learning rate rises, before it falls to 0; both linearly."""
    weight_decay: float = 0.3
    """Of the optimizer."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient."""
    optimizer: OptimizerName = "adamw"
    """'adamw' (published), 'adafactor' or 'adamw8bit' (bitsandbytes)."""
    guidance_scale: float = 5.0
    """Of the prediction by which an unfinished image is seen; 1 is none."""
    labels: Literal["people", "clip"] = "people"
    """Who says which image is better: 'people' (SD1.5), or the CLIP that the training starts from (SDXL)."""
    min_label_gap: float = 0.1
    """clip: least difference of its two probabilities; else the pair is a tie."""


@dataclass(frozen=True, kw_only=True)
class TrainableJudge:
    """A network that scores images of a timestep, and how it is shown images and prompts."""

    network: Denoiser
    """Called with pixels of images, their timesteps and words of prompts: a log-odds score for each image. The
    images are those of all prompts in order, once or several times over."""
    see: Callable[[UInt8[np.ndarray, "image height width rgb"]], Float[Tensor, "image ..."]]
    """8-bit images as the network takes them."""
    read: Callable[[Sequence[str]], Int[Tensor, "prompt word"]]
    """Prompts as the network takes them."""
    save: Callable[[Path], None]
    """Write the network into a folder."""


def check_settings(settings: StepJudgeSettings) -> None:
    """UserError for settings that train nothing; names flag, value and what to do."""
    for name, value, least in (
        ("num_steps", settings.num_steps, 1),
        ("batch_pairs", settings.batch_pairs, 1),
        ("warmup_steps", settings.warmup_steps, 0),
        ("guidance_scale", settings.guidance_scale, 1),
    ):
        if value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")
    if settings.warmup_steps > settings.num_steps:
        raise UserError(
            f"warmup_steps is {settings.warmup_steps} and num_steps is {settings.num_steps}: the learning rate "
            "would never be reached. Lower the first (published: 500 of 8,000)"
        )
    if not 0 <= settings.min_label_gap < 1:
        raise UserError(
            f"min_label_gap is {settings.min_label_gap}; it is a difference of probabilities, from 0 to below 1"
        )


def learning_rate(step: int, settings: StepJudgeSettings) -> float:
    """Of a step, from 1: rises linearly, then falls linearly to nearly 0.

    Differs from the published code: DeepSpeed's warmup rises with the logarithm of the step.
    """
    warmup, total = settings.warmup_steps, settings.num_steps
    if step < warmup:
        return settings.learning_rate * step / warmup
    return settings.learning_rate * (total - step + 1) / (total - warmup + 1)
