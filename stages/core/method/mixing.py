"""Mixup of ranked preference data: how many human pairs join the generated ones, and which."""

from __future__ import annotations

from collections.abc import Sequence

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
    num_available: int, num_wanted: int, seed: int, left_out: Sequence[int] = ()
) -> Int[np.ndarray, " chosen"]:
    """Rows of `num_wanted` different human pairs, in rising order; all of them if fewer exist.

    Each row that is left out makes room for the next one; the others stay the same.
    """
    order = np.random.default_rng(seed).permutation(num_available)
    chosen = order[~np.isin(order, left_out)][:num_wanted]
    return np.sort(chosen).astype(np.int64)
