"""A training that ends when held-out pairs are judged worse, with the latest weights that judge no worse."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Score = Float[np.ndarray, " pair"]
"""Each held-out pair's log-loss at the best softening of all (`softened_log_loss`). Unlike accuracy it falls with
what was learnt: a step too small to change an image may order every pair. Unlike the plain log-loss it does not
punish margins that are larger than dpo_beta takes for sure, as those of LoRA are."""


def kept_score(scores: Sequence[Score]) -> int:
    """Position of the latest score that is not worse than the lowest by more than a standard error.

    The standard error is that of the mean over pairs of their differences. A few dozen pairs cannot tell one step
    from the next, and their lowest log-loss falls on any of them (benchmarks/stopping.md); they can tell that a
    training has begun to do harm. 0, the start, where no score is lower than the start's.
    """
    means = [float(score.mean()) for score in scores]
    lowest = min(range(len(scores)), key=lambda place: (means[place], place))
    if lowest == 0:
        return 0
    return max(
        place
        for place in range(lowest, len(scores))
        if means[place] - means[lowest] <= standard_error(scores[place] - scores[lowest])
    )


def standard_error(differences: Score) -> float:
    """Of their mean; 0 of a single one, which cannot excuse anything."""
    count = len(differences)
    return float(differences.std(ddof=1)) / math.sqrt(count) if count > 1 else 0.0


class KeptWeights:
    """A copy of the weights at the score that would be kept so far; without patience it does nothing."""

    def __init__(self, parameters: Sequence[Tensor], patience: int) -> None:
        self._parameters, self._patience = parameters, patience
        self.saved: list[Tensor] | None = None

    def note(self, scores: Sequence[Score]) -> None:
        """Copy the weights if the last score is the one to keep.

        Once a score is not the one to keep it never will be, so the last copy is the right one.
        """
        if self._patience and kept_score(scores) == len(scores) - 1:
            self.saved = [weight.detach().cpu().clone() for weight in self._parameters]

    def is_over(self, scores: Sequence[Score], num_early: int = 0) -> bool:
        """Whether the last `patience` scores were all worse; the first `num_early` ones are not counted."""
        since = len(scores) - max(1 + kept_score(scores), num_early)
        return bool(self._patience) and since >= self._patience

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the policy the kept weights."""
        for weight, saved in zip(self._parameters, self.saved or [], strict=False):
            weight.copy_(saved)
