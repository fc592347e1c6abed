"""Mixup of ranked preference data: how many human pairs join the generated ones, and which."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int


def num_human_pairs(num_generated: int, seed_fraction: float) -> int:
    """How many human pairs make up `seed_fraction` of a mix that keeps every generated pair.

    ValueError unless 0 <= seed_fraction < 1. Paper: SAIL Alg. 1 with alpha = 1 - seed_fraction.
    """
    if not 0 <= seed_fraction < 1:
        raise ValueError(f"seed_fraction must be in [0, 1), found {seed_fraction}")
    return round(num_generated * seed_fraction / (1 - seed_fraction))


def choose_without_replacement(
    num_available: int, num_wanted: int, seed: int
) -> Int[np.ndarray, " chosen"]:
    """Rows of `num_wanted` different human pairs, in rising order; all of them if fewer exist."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(num_available)[: min(num_wanted, num_available)]
    return np.sort(chosen).astype(np.int64)
