"""The implicit reward of an image, its standard error, and what it says about two images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Errors = Float[np.ndarray, "image draw"]
PerImage = Float[np.ndarray, " image"]
PerDraw = Float[np.ndarray, " draw"]


@dataclass(frozen=True)
class ImplicitReward:
    """Rewards of several images of one prompt; higher is preferred."""

    reward: PerImage
    standard_error: PerImage


def implicit_reward(
    *, policy_errors: Errors, reference_errors: Errors, weights: PerDraw | None = None
) -> ImplicitReward:
    """Mean over draws of (reference error - policy error), and its standard error over draws.

    With weights their weighted mean; without, all draws count alike, as in the paper.

    In units of mean squared noise: multiply by dpo_beta / 2 for log-odds. Both models and all
    images of a prompt must have been given the same draws. ValueError if the shapes differ.
    Paper: SAIL Eq. 8 without its factor dpo_beta / 2, which changes no ranking.
    """
    if policy_errors.shape != reference_errors.shape:
        raise ValueError(
            f"policy errors have shape {policy_errors.shape}, reference errors "
            f"{reference_errors.shape}; both models need the same images and draws"
        )
    gain = reference_errors.astype(np.float64) - policy_errors.astype(np.float64)
    return ImplicitReward(*weighted_mean(gain, weights))


def weighted_mean(
    values: Float[np.ndarray, "row draw"], weights: PerDraw | None
) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """(each row's weighted mean over draws, its standard error, which is nan for one draw).

    The error is that of a ratio of sums over independent draws; for equal weights it is the spread over the
    root of their number.
    """
    num_draws = values.shape[1]
    if weights is None:
        spread = values.std(axis=1, ddof=1) if num_draws > 1 else np.full(len(values), np.nan)
        return values.mean(axis=1), spread / np.sqrt(num_draws)
    mean = values @ weights / weights.sum()
    apart = np.sqrt((((values - mean[:, None]) * weights) ** 2).sum(axis=1)) / weights.sum()
    factor = np.sqrt(num_draws / (num_draws - 1)) if num_draws > 1 else np.nan
    return mean, apart * factor


def share_moved(
    found: Float[np.ndarray, "prompt candidate"], exact: Float[np.ndarray, "prompt candidate"]
) -> float:
    """How far rewards are from exact ones within their prompts, in spreads of a prompt's exact rewards.

    What all candidates of a prompt share ranks nothing and does not count. 0 where no reward differs.
    """
    spread = float(exact.std(axis=1).mean())
    apart = (found - found.mean(axis=1, keepdims=True)) - (
        exact - exact.mean(axis=1, keepdims=True)
    )
    return float(np.sqrt(np.square(apart).mean())) / spread if spread else 0.0


def margin_standard_error(
    *,
    policy_errors: Errors,
    reference_errors: Errors,
    best: int,
    worst: int,
    weights: PerDraw | None = None,
) -> float:
    """Standard error of reward[best] - reward[worst] over the draws they share; nan for one draw."""
    gain = reference_errors.astype(np.float64) - policy_errors.astype(np.float64)
    _, error = weighted_mean((gain[best] - gain[worst])[None], weights)
    return float(error[0])


def preference_probability(margin: float, dpo_beta: float) -> float:
    """Probability that the better image is preferred, by the policy. Paper: SAIL Eq. 9."""
    return float(np.exp(-np.logaddexp(0.0, -0.5 * dpo_beta * margin)))
