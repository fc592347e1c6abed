"""The loss of a step-aware preference model: two images of one prompt, seen as they were at a timestep.

Liang et al., "Aesthetic Post-Training Diffusion Models from Generic Preferences with Step-by-step Preference
Optimization", Sec. 4.1; the loss is that of its published code, PickScore's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

PerPair = Float[Tensor, " pair"]


def step_preference_loss(first: PerPair, second: PerPair, label: PerPair) -> PerPair:
    """Cross-entropy of softmax(first, second) with (label, 1 - label); 0 at best, for a tie too.

    Scores are log-odds. `label` is 1 where the first image is preferred, 0 where the second is, and 1/2 for a tie,
    whose loss is lowered by ln 2: it is least where the scores are equal.
    """
    gap = first - second
    found = -label * functional.logsigmoid(gap) - (1 - label) * functional.logsigmoid(-gap)
    return found - math.log(2) * (label == 0.5).to(found.dtype)


def pair_weights(prompts: Sequence[str], rows: Sequence[int]) -> PerPair:
    """What each pair of a batch counts: one over the pairs of its prompt among all, and 1 together; float64."""
    of_prompt = Counter(prompts)
    each = torch.tensor([1 / of_prompt[prompts[row]] for row in rows], dtype=torch.float64)
    return each / each.sum()


def labels_by_score(first: PerPair, second: PerPair, min_gap: float) -> PerPair:
    """Labels by another judge's scores: a tie unless its two probabilities differ by more than `min_gap`."""
    gap = torch.tanh((first - second) / 2)  # of softmax(first, second)
    tie = torch.full_like(gap, 0.5)
    return torch.where(gap.abs() > min_gap, (gap > 0).to(gap.dtype), tie)


def shares_right(first: PerPair, second: PerPair, label: PerPair) -> PerPair:
    """1 where the preferred image has the higher score, 0 where the other has; 1/2 for equal scores and for ties."""
    sign = (label - 0.5).sign() * (first - second).sign()
    return (sign + 1) / 2
