"""Errors at as many draws as a candidate needs: those that cannot be best or worst get no more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.core.method.allocation import cannot_win_or_lose, spread_order
from stages.core.method.noising import Draws
from stages.core.method.scoring import Errors, Judge, draw_errors
from stages.core.models.adapter import DiffusionModel
from stages.core.models.conditioning import Conditioning

DRAWS_A_ROUND = 2
"""Between two looks at who needs more."""


def in_order(draws: Draws, order: Int[np.ndarray, " draw"]) -> Draws:
    """The same draws one after the other in another order."""
    places = torch.from_numpy(order)
    return Draws(draws.timesteps[places], draws.noise[places])


def rounds(num_draws: int, first_draws: int) -> list[slice]:
    """Which draws are made at once: the first few, then some each round."""
    starts = [0, *range(min(first_draws, num_draws), num_draws, DRAWS_A_ROUND)]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], num_draws], strict=True) if b > a]


def adaptive_errors(
    model: DiffusionModel,
    judge: Judge,
    latents: Float[Tensor, "image ..."],
    text: Conditioning,
    draws: Draws,
    *,
    weights: Float[np.ndarray, " draw"],
    first_draws: int,
    confidence: float,
    rows_per_batch: int | None = None,
) -> tuple[Errors, Int[np.ndarray, " image"]]:
    """(errors, how many draws each image has); errors beyond an image's own are nan.

    `draws` are taken in their order, so bring them into one in which the first are spread (`spread_order`). `weights`
    are what each counts in the reward that ranks.
    """
    num_images, num_draws = len(latents), len(draws.timesteps)
    found = Errors(*(torch.full((num_images, num_draws), torch.nan) for _ in range(3)))
    active = np.arange(num_images)
    num_seen = np.zeros(num_images, np.int64)
    for part in rounds(num_draws, first_draws):
        some = draw_errors(
            model, judge, latents[torch.from_numpy(active)], text,
            Draws(draws.timesteps[part], draws.noise[part]), rows_per_batch=rows_per_batch,
        )  # fmt: skip
        for name, values in vars(some).items():
            getattr(found, name)[active, part] = values
        num_seen[active] = part.stop
        parts = weighted_parts(found, active, part.stop, weights)
        active = active[~cannot_win_or_lose(parts, confidence)]
    return found, num_seen


def weighted_parts(
    errors: Errors,
    images: Int[np.ndarray, " image"],
    num_draws: int,
    weights: Float[np.ndarray, " draw"],
) -> Float[np.ndarray, "image seen"]:
    """What each of the first draws adds to the images' rewards."""
    policy, reference = (
        values[images, :num_draws].double().numpy() for values in (errors.policy, errors.reference)
    )
    return (reference - policy) * weights[:num_draws]


def spread(draws: Draws) -> Draws:
    """The draws in an order in which the first few are spread over all timesteps."""
    return in_order(draws, spread_order(len(draws.timesteps)))


def prefixes(
    values: Float[Tensor, "image draw"], num_seen: Int[np.ndarray, " image"]
) -> Sequence[np.ndarray]:
    """Each image's own part of the errors."""
    return [row[:seen] for row, seen in zip(values.numpy(), num_seen, strict=True)]
