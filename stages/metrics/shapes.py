"""The embedded world's oracles as metrics: the known taste and its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from jaxtyping import Float, UInt8

from stages.core.errors import UserError
from stages.shapes.captions import IMAGE_SIZE
from stages.shapes.oracle import ORACLES, Scores


def score(
    name: str,
    *,
    images: UInt8[np.ndarray, "image height width rgb"],
    prompts: Sequence[str],
) -> Float[np.ndarray, " image"]:
    """The oracle's score of each image. UserError for pictures or captions of another world."""
    if images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 3):
        raise UserError(
            f"metric {name!r} scores {IMAGE_SIZE} x {IMAGE_SIZE} pictures of the embedded world, "
            f"found {images.shape[2]} x {images.shape[1]}"
        )
    try:
        return ORACLES[name]((images / 255).astype(np.float32), prompts)
    except ValueError as error:
        raise UserError(f"metric {name!r}: {error}") from error


def _loader(name: str) -> Callable[[], Callable[..., Scores]]:
    return lambda: partial(score, name)


SCORERS = {name: _loader(name) for name in ORACLES}
