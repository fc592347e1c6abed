"""A training that ends when held-out pairs are no longer judged better, with the weights of the best."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Score = float
"""Minus the held-out log-loss at the best softening (`softened_log_loss`). Unlike accuracy it grows with
what was learnt: a step too small to change an image may order every pair. Unlike the plain log-loss it does not
punish margins that are larger than dpo_beta takes for sure, as those of LoRA are."""


def best_score(scores: Sequence[Score]) -> int:
    """Position of the best score; the first of equal ones."""
    return max(range(len(scores)), key=lambda place: (scores[place], -place))


class BestWeights:
    """A copy of the weights at the best score so far; without patience it does nothing."""

    def __init__(self, parameters: Sequence[Tensor], patience: int) -> None:
        self._parameters, self._patience = parameters, patience
        self.saved: list[Tensor] | None = None

    def note(self, scores: Sequence[Score]) -> None:
        """Keep the weights if the last score is the best."""
        if self._patience and best_score(scores) == len(scores) - 1:
            self.saved = [weight.detach().cpu().clone() for weight in self._parameters]

    def is_over(self, scores: Sequence[Score], num_early: int = 0) -> bool:
        """Whether the last `patience` scores brought no gain; the first `num_early` ones are not counted."""
        since = len(scores) - max(1 + best_score(scores), num_early)
        return bool(self._patience) and since >= self._patience

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the policy the best weights."""
        for weight, saved in zip(self._parameters, self.saved or [], strict=False):
            weight.copy_(saved)
