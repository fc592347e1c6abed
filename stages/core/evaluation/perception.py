"""How different two pictures look from some steps away: CIELAB differences over a Gaussian pyramid.

Pixel noise and the grain of a texture vanish at a distance, shape, place and colour stay. Zhang and
Wandell, A spatial extension of CIELAB (1997), blur before they compare for the same reason; the
pyramid is that of Burt and Adelson, The Laplacian pyramid as a compact image code (1983). It needs
no weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage

LARGEST, SMALLEST = 64, 8
"""Shorter sides, in pixels, of the levels that are compared; what is larger is reduced first."""

KERNEL = np.array([1, 4, 6, 4, 1]) / 16
TO_XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
"""From linear sRGB, white D65 (IEC 61966-2-1)."""

Light = Float[np.ndarray, "height width rgb"]
Lab = Float[np.ndarray, "_ _ lab"]
"""A level of a picture: each has its own height and width."""


def perceptual_distance(first: Sequence[Lab], second: Sequence[Lab]) -> float:
    """Mean CIE 1976 colour difference of two pictures' levels, mean over levels; both of one size.

    From 0 (the same) to 100 (black and white) and a little above (saturated colours); about 2.3 is
    just noticeable.
    """
    differences = [
        np.linalg.norm(a - b, axis=-1).mean() for a, b in zip(first, second, strict=True)
    ]
    return float(np.mean(differences))


def lab_levels(image: UInt8[np.ndarray, "height width rgb"]) -> list[Lab]:
    """The picture in CIELAB as seen from further and further away, each level half as large."""
    light = linear_light(image)
    while min(light.shape[:2]) > LARGEST:
        light = reduce(light)
    levels = [to_lab(light)]
    while min(light.shape[:2]) >= 2 * SMALLEST:
        light = reduce(light)
        levels.append(to_lab(light))
    return levels


def linear_light(image: UInt8[np.ndarray, "height width rgb"]) -> Light:
    """The light of each pixel in [0, 1]; blurring averages light, not its sRGB code."""
    code = image.astype(np.float64) / 255
    return np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)


def reduce(light: Light) -> Float[np.ndarray, "half_height half_width rgb"]:
    """Half as many rows and columns, after a blur of both."""
    for axis in (0, 1):
        light = ndimage.convolve1d(light, KERNEL, axis=axis, mode="mirror")
    return light[::2, ::2]


def to_lab(light: Light) -> Float[np.ndarray, "height width lab"]:
    """CIELAB against D65: lightness in [0, 100], green to red, blue to yellow."""
    relative = light @ (TO_XYZ / TO_XYZ.sum(axis=1, keepdims=True)).T
    edge = 6 / 29
    x, y, z = np.moveaxis(
        np.where(relative > edge**3, np.cbrt(relative), relative / (3 * edge**2) + 4 / 29), -1, 0
    )
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)
