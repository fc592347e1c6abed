"""The implicit reward of an image, its standard error, and what it says about two images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Errors = Float[np.ndarray, "image draw"]
PerImage = Float[np.ndarray, " image"]


@dataclass(frozen=True)
class ImplicitReward:
    """Rewards of several images of one prompt; higher is preferred."""

    reward: PerImage
    standard_error: PerImage


def implicit_reward(*, policy_errors: Errors, reference_errors: Errors) -> ImplicitReward:
    """Mean over draws of (reference error - policy error), and its standard error over draws.

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
    num_draws = gain.shape[1]
    spread = gain.std(axis=1, ddof=1) if num_draws > 1 else np.full(len(gain), np.nan)
    return ImplicitReward(gain.mean(axis=1), spread / np.sqrt(num_draws))


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
    *, policy_errors: Errors, reference_errors: Errors, best: int, worst: int
) -> float:
    """Standard error of reward[best] - reward[worst] over the draws they share; nan for one draw."""
    gain = reference_errors.astype(np.float64) - policy_errors.astype(np.float64)
    difference = gain[best] - gain[worst]
    if len(difference) < 2:
        return float("nan")
    return float(difference.std(ddof=1) / np.sqrt(len(difference)))


def preference_probability(margin: float, dpo_beta: float) -> float:
    """Probability that the better image is preferred, by the policy. Paper: SAIL Eq. 9."""
    return float(np.exp(-np.logaddexp(0.0, -0.5 * dpo_beta * margin)))
