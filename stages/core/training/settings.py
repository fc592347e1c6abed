"""What decides a training's result, and how it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from stages.core.method.noising import DrawLaw
from stages.core.method.objective import WITHOUT_REFERENCE, LossName
from stages.core.training.optimizers import OptimizerName

ErrorWeights = Literal["uniform", "velocity", "epsilon", "elbo", "inverse_snr"]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Everything about the optimisation that changes its result."""

    dpo_beta: float
    """Strength of the pull towards the reference, with mean errors (paper: 5000)."""
    learning_rate: float
    """Of the optimizer, after the warmup."""
    batch_pairs: int
    """Pairs per optimizer step; of single likes images."""
    passes: float
    """Passes over the pairs; the number of steps is passes x pairs / batch_pairs, rounded up."""
    warmup_share: float
    """Share of the steps over which the learning rate rises from 0, linearly."""
    gradient_clip: float
    """Largest norm of the gradient."""
    weight_decay: float
    """Of the optimizer."""
    caption_dropout: float
    """Share of pairs that are trained on with an empty caption, the same for both images."""
    loss: LossName = "sigmoid"
    """'sigmoid' (paper), 'ipo', 'mapo' (no reference; Table 1's baseline), or 'kto' (each image by itself)."""
    kto_liked_share: float = 0.5
    """kto: how much the liked images count, the others the rest (published: 0.8 of a batch are liked)."""
    label_smoothing: float = 0.0
    """Share of labels taken to be wrong (cDPO, with the sigmoid loss); 0 trusts them all (paper)."""
    optimizer: OptimizerName = "adamw"
    """'adamw' (paper, SD1.5), 'adafactor' (paper, SDXL) or 'adamw8bit' (bitsandbytes)."""
    ema_decay: float = 0.0
    """Decay of the average of the weights that becomes the policy; 0 takes the last ones (paper)."""
    stop_after_no_gain: int = 0
    """Held-out scores in a row that are worse than the best by more than a standard error, which end the
    training with the latest weights that are not; 0 trains to the end and keeps the last (paper)."""
    draw_law: DrawLaw = "uniform"
    """How timesteps are drawn: 'uniform' (paper) or 'logit_normal'."""
    weights: ErrorWeights = "uniform"
    """What an error counts at its timestep: 'uniform' (paper); of flow matching also 'velocity', which is the
    same, 'epsilon', 'elbo' and 'inverse_snr'."""
    embedded_guidance: float = 1.0
    """The guidance that a guidance-distilled model is told while it is trained."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a training runs; changes its result by rounding at most."""

    micro_batch_pairs: int | None = None
    """Pairs that go through the network at once; gradients are accumulated over the batch."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, more time (benchmarks/training.md)."""
    save_minutes: float = 10.0
    """Minutes of training after which its state is saved, at the end of a step: what a kill costs at most."""
    save_every: int | None = None
    """Also after every so many steps; None saves by minutes alone."""


def needs_reference(settings: TrainingSettings) -> bool:
    """Whether the loss looks at the reference at all."""
    return settings.loss not in WITHOUT_REFERENCE


def num_steps(num_pairs: int, settings: TrainingSettings) -> int:
    """Optimizer steps of a training; at least one."""
    return max(1, math.ceil(settings.passes * num_pairs / settings.batch_pairs))
