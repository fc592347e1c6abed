"""Scorers of images, one file each, behind one small interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray

from stages.core.errors import UserError
from stages.metrics import pixels, shapes

Images = UInt8[NDArray[np.uint8], "image height width rgb"]
Scorer = Callable[..., Float[NDArray[np.float32], " image"]]
"""Called as scorer(images=..., prompts=...); one score an image, higher is better."""

SCORERS: dict[str, Callable[[], Scorer]] = {**pixels.SCORERS, **shapes.SCORERS}
"""How to load each metric, by name."""


def load_scorer(name: str) -> Scorer:
    """The metric of that name. UserError lists the names there are."""
    if name not in SCORERS:
        raise UserError(f"there is no metric {name!r}; expected one of {', '.join(SCORERS)}")
    return SCORERS[name]()


def score_in_batches(
    scorer: Scorer, images: Sequence[NDArray[np.uint8]], prompts: Sequence[str], batch: int = 64
) -> list[float]:
    """The metric's score of every image."""
    scores: list[float] = []
    for start in range(0, len(images), batch):
        part = slice(start, start + batch)
        scores += scorer(images=np.stack(images[part]), prompts=prompts[part]).tolist()
    return scores
