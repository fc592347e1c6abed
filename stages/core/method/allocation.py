"""Draws where the information is: timesteps in proportion to what they say, and no more draws than are needed.

Both change what a reward costs, and are unbiased about what it is. Differs from the paper: it draws ten of each.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import special

FLOOR = 0.1
"""Share of the draws that are spread evenly, so that no draw counts more than 1 / FLOOR times."""


def density_of(
    weights: Float[np.ndarray, " bin"], spreads: Float[np.ndarray, " bin"]
) -> Float[np.ndarray, " bin"]:
    """How many times as often as evenly a timestep of each bin is drawn; the mean over bins is 1.

    In proportion to a bin's weight times its spread, which gives a sum over bins its least variance (Neyman's
    allocation), but for the share FLOOR. Even where nothing is known.
    """
    wanted = weights * spreads
    total = float(wanted.mean())
    shares = wanted / total if total > 0 else np.ones_like(wanted)
    return FLOOR + (1 - FLOOR) * shares


def importance_weights(
    timesteps: Int[np.ndarray, " draw"], num_timesteps: int, density: Float[np.ndarray, " bin"]
) -> Float[np.ndarray, " draw"]:
    """What a draw counts in a plain mean, so that its expectation is that of even draws: 1 / density."""
    return 1 / density[timesteps * len(density) // num_timesteps]


def spread_order(num_draws: int) -> Int[np.ndarray, " draw"]:
    """An order of draws of rising timesteps in which the first few are spread over all (van der Corput's)."""
    bits = max(1, (num_draws - 1).bit_length())
    turned = [int(format(place, f"0{bits}b")[::-1], 2) for place in range(2**bits)]
    return np.array([place for place in turned if place < num_draws])


def cannot_win_or_lose(
    parts: Float[np.ndarray, "candidate draw"], confidence: float
) -> Bool[np.ndarray, " candidate"]:
    """Which candidates are neither the best nor the worst, each of both at a confidence.

    `parts` are what each shared draw adds to a candidate's reward. A candidate is told from the best so far, and from
    the worst so far, by a one-sided t test of their differences draw by draw. Best and worst were picked for being so,
    and many are compared, so the share of wrong answers is not 1 - confidence: benchmarks/draws.md has it measured.
    """
    num_draws = parts.shape[1]
    means = parts.mean(axis=1)
    limit = special.stdtrit(num_draws - 1, confidence)

    def is_above(high: np.ndarray, low: np.ndarray) -> np.ndarray:
        gaps = high - low
        errors = gaps.std(axis=1, ddof=1) / np.sqrt(num_draws)
        return gaps.mean(axis=1) > limit * errors

    best, worst = parts[[means.argmax()]], parts[[means.argmin()]]
    return is_above(best, parts) & is_above(parts, worst)


def completed(
    parts: Float[np.ndarray, "candidate draw"], num_seen: Int[np.ndarray, " candidate"]
) -> Float[np.ndarray, " candidate"]:
    """The mean over draws of each candidate, of which some saw the first few only.

    Those are as far from the candidates that saw all as they were on the draws that they shared: what moved all
    candidates alike moves them too. Parts that were not seen are not looked at.
    """
    has_all = num_seen == parts.shape[1]
    full = parts[has_all]
    means = np.zeros(len(parts))
    means[has_all] = full.mean(axis=1)
    for place in np.flatnonzero(~has_all):
        seen = slice(0, int(num_seen[place]))
        means[place] = full.mean() + parts[place, seen].mean() - full[:, seen].mean()
    return means
