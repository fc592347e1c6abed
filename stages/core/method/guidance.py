"""Which of a sampler's steps have guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence


def guided_steps(number: int, interval: Sequence[float | int]) -> range:
    """Which of so many steps, counted from 0, have guidance: those that begin within the interval of shares."""
    first, last = (math.ceil(number * share - 1e-9) for share in interval)
    return range(first, last)
