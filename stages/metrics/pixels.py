"""Two measures of any picture from its pixels alone: they need no weights and know no prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, UInt8

Images = UInt8[np.ndarray, "image height width rgb"]
Scores = Float[np.ndarray, " image"]

LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""


def colourfulness(*, images: Images, prompts: Sequence[str]) -> Scores:
    """How colourful people find a picture; 0 is grey, above 80 is highly colourful.

    Hasler and Suesstrunk, "Measuring colourfulness in natural images" (2003), M3.
    """
    red, green, blue = np.moveaxis(images.astype(np.float64), -1, 0)
    opponents = np.stack([red - green, 0.5 * (red + green) - blue]).reshape(2, len(images), -1)
    spread = np.hypot(*opponents.std(axis=2))
    strength = np.hypot(*opponents.mean(axis=2))
    return (spread + 0.3 * strength).astype(np.float32)


def sharpness(*, images: Images, prompts: Sequence[str]) -> Scores:
    """Logarithm of the variance of the brightness's Laplacian; blurred pictures score low.

    Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy" (2000), in log(1 + v) so
    that a few sharp pictures do not decide a mean.
    """
    brightness = images.astype(np.float64) @ LUMA
    middle = brightness[:, 1:-1, 1:-1]
    around = (
        brightness[:, :-2, 1:-1]
        + brightness[:, 2:, 1:-1]
        + brightness[:, 1:-1, :-2]
        + brightness[:, 1:-1, 2:]
    )
    return np.log1p((around - 4 * middle).reshape(len(images), -1).var(axis=1)).astype(np.float32)


SCORERS: dict[str, Callable[[], Callable[..., Scores]]] = {
    "colourfulness": lambda: colourfulness,
    "sharpness": lambda: sharpness,
}
