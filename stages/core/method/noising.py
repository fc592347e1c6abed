"""Draws of (timestep, noise): shared by all candidates of a prompt, by both models, by both of a pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    """A CPU generator: noise is drawn on the CPU, so that every device gets the same."""
    return torch.Generator("cpu").manual_seed(seed)


@dataclass(frozen=True)
class Draws:
    """Timesteps and noise that images are noised with."""

    timesteps: Int[Tensor, " draw"]
    noise: Float[Tensor, "draw ..."]


DrawLaw = Literal["uniform", "logit_normal"]
"""How likely each row of the noise schedule is to be drawn."""


def timesteps_at(
    position: Float[Tensor, " draw"], num_timesteps: int, law: DrawLaw
) -> Int[Tensor, " draw"]:
    """The timesteps at some positions in [0, 1) of a law: its quantiles.

    'uniform': every timestep is as likely. 'logit_normal': the share of the schedule below the timestep is
    sigmoid(x), x standard normal (Esser et al., "Scaling Rectified Flow Transformers", Sec. 3.1, with m = 0 and s = 1).
    A model's own shift towards noise lies in its schedule.
    """
    if law == "logit_normal":
        position = torch.sigmoid(torch.special.ndtri(position))
    return (position * num_timesteps).long().clamp(max=num_timesteps - 1)


def stratified_timesteps(
    num_draws: int, num_timesteps: int, rng: torch.Generator, law: DrawLaw = "uniform"
) -> Int[Tensor, " draw"]:
    """One timestep from each of `num_draws` equally likely bins of [0, num_timesteps), in rising order.

    Differs from the paper: it draws them independently; strata are unbiased and vary less.
    """
    jitter = torch.rand(num_draws, generator=rng, dtype=torch.float64)
    position = (torch.arange(num_draws, dtype=torch.float64) + jitter) / num_draws
    return timesteps_at(position, num_timesteps, law)


def allocated_timesteps(
    num_draws: int,
    num_timesteps: int,
    density: Float[np.ndarray, " bin"],
    rng: torch.Generator,
) -> Int[Tensor, " draw"]:
    """Timesteps of that density over bins of equal width, one of each of `num_draws` equal shares, in rising order."""
    jitter = torch.rand(num_draws, generator=rng, dtype=torch.float64).numpy()
    share = (np.arange(num_draws) + jitter) / num_draws
    ends = np.concatenate([[0.0], np.cumsum(density) / density.sum()])
    ends[-1] = 1.0
    position = np.interp(share, ends, np.linspace(0.0, 1.0, len(ends)))
    return torch.from_numpy((position * num_timesteps).astype(np.int64)).clamp(
        max=num_timesteps - 1
    )


def reward_draws(
    seed: int,
    *,
    num_draws: int,
    num_timesteps: int,
    latents_shape: tuple[int, ...],
    law: DrawLaw = "uniform",
    density: Float[np.ndarray, " bin"] | None = None,
) -> Draws:
    """The draws for scoring the candidates of one prompt. Paper: SAIL Sec. 4.1 (10 draws).

    With a density of timesteps over bins (allocation.py) they are drawn by it, else evenly.
    """
    rng = generator(seed)
    if density is None:
        timesteps = stratified_timesteps(num_draws, num_timesteps, rng, law)
    else:
        timesteps = allocated_timesteps(num_draws, num_timesteps, density, rng)
    return Draws(timesteps, torch.randn((num_draws, *latents_shape), generator=rng))


def training_draws(
    seed: int,
    *,
    num_pairs: int,
    num_timesteps: int,
    latents_shape: tuple[int, ...],
    law: DrawLaw = "uniform",
) -> Draws:
    """One timestep and one noise for each pair of a batch; its two images share them."""
    rng = generator(seed)
    if law == "uniform":
        timesteps = torch.randint(num_timesteps, (num_pairs,), generator=rng)
    else:
        position = torch.rand(num_pairs, generator=rng, dtype=torch.float64)
        timesteps = timesteps_at(position, num_timesteps, law)
    return Draws(timesteps, torch.randn((num_pairs, *latents_shape), generator=rng))
