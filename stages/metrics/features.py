"""How far pictures of one prompt differ: in the features of a metric's CLIP, or to the eye."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from stages.core.errors import UserError
from stages.core.evaluation.perception import lab_levels, perceptual_distance
from stages.core.evaluation.statistics import mean_over_pairs
from stages.metrics import IMAGES_PER_BATCH, PERCEPTUAL, WITH_CLIP, load_scorer

if TYPE_CHECKING:
    import torch

    from stages.metrics.preprocessing import Picture

Group = Sequence["Picture"]
"""Pictures of one prompt."""
Rows = Float[np.ndarray, "image channel"]


def load_measure(
    name: str, options: Mapping[str, str] | None = None, device: torch.device | None = None
) -> Callable[[Sequence[Group]], list[float]]:
    """What gives the mean distance of two pictures of a group, for each group; nan for one picture.

    By a metric's CLIP 1 minus the cosine of their embeddings, in [0, 2]; otherwise the perceptual
    distance. UserError for another name, and the metric's own for its options and weights.
    """
    if name == PERCEPTUAL:
        return lambda groups: [perceptual_diversity(group) for group in groups]
    if name not in WITH_CLIP:
        raise UserError(
            f"there are no features {name!r}; expected one of {', '.join((PERCEPTUAL, *WITH_CLIP))}"
        )
    scorer: Any = load_scorer(name, options, device)

    def measure(groups: Sequence[Group]) -> list[float]:
        rows = embed([picture for group in groups for picture in group], scorer.pictures.embed)
        ends = np.cumsum([len(group) for group in groups])[:-1]
        return [cosine_diversity(part) for part in np.split(rows, ends)]

    return measure


def perceptual_diversity(group: Group) -> float:
    """Mean perceptual distance of two of the pictures."""
    levels = [lab_levels(np.asarray(picture)) for picture in group]
    return mean_over_pairs(levels, perceptual_distance)


def cosine_diversity(rows: Rows) -> float:
    """Mean of 1 minus the cosine of two of the rows, which have length 1."""
    return mean_over_pairs(list(rows), lambda one, other: max(0.0, 1 - float(one @ other)))


def embed(pictures: Group, network: Callable[[Group], torch.Tensor]) -> Rows:
    """One row of length 1 a picture."""
    parts = [
        network(pictures[start : start + IMAGES_PER_BATCH]).double().cpu().numpy()
        for start in range(0, len(pictures), IMAGES_PER_BATCH)
    ]
    rows = np.concatenate(parts)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
