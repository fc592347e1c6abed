"""Draws scenes: perfectly, or with the quality defects of a web-like training set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from stages.shapes.captions import BACKGROUNDS, COLOURS, IMAGE_SIZE, POSITIONS, SHAPES, SIZES, Scene

Images = Float[np.ndarray, "image height width rgb"]
Masks = Float[np.ndarray, "image height width"]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How one scene is drawn; the defaults are the ideal picture."""

    scene: Scene
    strength: float = 1.0
    """1 is the palette's colour, 0 is invisible against the background (fading)."""
    edge_width: float = 1.0
    """Pixels over which the edge passes from object to background; 1 is crisp, 10 is blurred."""
    shift: tuple[float, float] = (0.0, 0.0)
    """How far off its place the object is, in pixels (right, down)."""
    scale: float = 1.0
    """Factor on the radius."""


def draw(drawings: Sequence[Drawing]) -> Images:
    """Pictures of the drawings, values in [0, 1]."""
    cover = masks(drawings)[..., None]
    background = np.array([BACKGROUNDS[d.scene.background] for d in drawings], np.float32) / 255
    colour = np.array([COLOURS[d.scene.colour] for d in drawings], np.float32) / 255
    strength = np.array([d.strength for d in drawings], np.float32)[:, None]
    ink = background + strength * (colour - background)
    images = background[:, None, None] * (1 - cover) + ink[:, None, None] * cover
    return images.astype(np.float32)


def masks(drawings: Sequence[Drawing]) -> Masks:
    """Share of each pixel that the object covers, in [0, 1]."""
    axis = np.arange(IMAGE_SIZE, dtype=np.float32) - (IMAGE_SIZE - 1) / 2
    offsets = np.array(
        [
            (
                POSITIONS[d.scene.position][1] + d.shift[0],
                POSITIONS[d.scene.position][2] + d.shift[1],
            )
            for d in drawings
        ],
        np.float32,
    )
    x = axis[None, None, :] - offsets[:, 0, None, None]
    y = axis[None, :, None] - offsets[:, 1, None, None]
    radius = np.array([SIZES[d.scene.size] * d.scale for d in drawings], np.float32)
    shapes = np.array([d.scene.shape for d in drawings])
    distance = np.empty((len(drawings), IMAGE_SIZE, IMAGE_SIZE), np.float32)
    for shape in SHAPES:
        of_shape = shapes == shape
        if of_shape.any():
            distance[of_shape] = _distance(
                shape, x[of_shape], y[of_shape], radius[of_shape][:, None, None]
            )
    width = np.array([d.edge_width for d in drawings], np.float32)[:, None, None]
    inside = np.clip(0.5 - distance / width, 0, 1)
    return inside * inside * (3 - 2 * inside)


def _distance(
    shape: str,
    x: NDArray[np.float32],
    y: NDArray[np.float32],
    r: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Signed distance to the shape's edge in pixels, negative inside (an estimate near corners)."""
    match shape:
        case "circle":
            return np.hypot(x, y) - 0.95 * r
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) - 0.85 * r
        case "diamond":
            return (np.abs(x) + np.abs(y) - 1.15 * r) / np.sqrt(2.0, dtype=np.float32)
        case "triangle":
            slope = np.hypot(2.0, 1.1)
            return np.maximum(y - 0.85 * r, (2.0 * np.abs(x) - 1.1 * (y + 1.05 * r)) / slope)
        case "cross":
            upright = np.maximum(np.abs(x) - 0.32 * r, np.abs(y) - r)
            lying = np.maximum(np.abs(x) - r, np.abs(y) - 0.32 * r)
            return np.minimum(upright, lying)
        case "ring":
            return np.abs(np.hypot(x, y) - 0.78 * r) - 0.24 * r
    raise ValueError(f"no shape is called {shape!r}; the shapes are {', '.join(SHAPES)}")


def web_like(scene: Scene, rng: np.random.Generator) -> Drawing:
    """One training picture of mixed quality: faded, blurred, off its place, or of the wrong thing.

    Each defect comes independently, so that a model of these pictures can do better than it does
    on average. All are defects that VAE latents can hold; pixel noise is not one.
    """
    if rng.random() < 0.12:
        scene = replace(scene, colour=str(rng.choice(list(COLOURS))))
    if rng.random() < 0.12:
        scene = replace(scene, shape=str(rng.choice(SHAPES)))
    off_place = rng.random() < 0.6
    return Drawing(
        scene=scene,
        strength=float(rng.uniform(0.35, 1.0)) if rng.random() < 0.65 else 1.0,
        edge_width=float(rng.uniform(1.0, 10.0)) if rng.random() < 0.65 else 1.0,
        shift=(float(rng.normal(0, 3.5)), float(rng.normal(0, 3.5))) if off_place else (0.0, 0.0),
        scale=float(rng.uniform(0.85, 1.1)),
    )
