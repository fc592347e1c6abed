"""How many captions of the embedded world each set has."""

from __future__ import annotations

from stages.shapes.captions import open_captions

FOLD_CAPTIONS = 200
"""Captions of each of the two evaluation folds."""


def num_pool_captions(num_seed_captions: int) -> int:
    """Captions that are left for the iterations; none or fewer if people are asked about too many."""
    return len(open_captions()) - 2 * FOLD_CAPTIONS - num_seed_captions
