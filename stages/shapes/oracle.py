"""The known taste of the embedded world, computed from pixels: it plays the human and PickScore."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from stages.shapes.captions import BACKGROUNDS, COLOURS, parse_caption
from stages.shapes.renderer import Drawing, Images, draw, masks

Scores = Float[np.ndarray, " image"]

CAPTION_MATCH_WEIGHT = 3.0
"""Caption match is the backbone of the taste; crispness and vividness count once each."""


def caption_match(images: Images, captions: Sequence[str]) -> Scores:
    """How much of the picture its caption asks for is there, in [0, 1].

    Object pixels that look right, over all object pixels and all background pixels that look
    wrong: an intersection over union in which a pixel of another colour counts in part.
    """
    drawings = [Drawing(scene=parse_caption(caption)) for caption in captions]
    cover = masks(drawings)
    difference = np.sqrt(np.square(images - draw(drawings)).mean(axis=-1))
    agreement = np.exp(-np.square(difference / 0.25))
    hits = (cover * agreement).sum(axis=(1, 2))
    misses = ((1 - cover) * (1 - agreement)).sum(axis=(1, 2))
    return (hits / (cover.sum(axis=(1, 2)) + misses)).astype(np.float32)


def vividness(images: Images, captions: Sequence[str]) -> Scores:
    """How far the object's colour stands from the background's, of what the palette asks, in [0, 1].

    Bounded at the palette: an over-saturated picture earns nothing more. Measured against the
    picture's own background (its median colour), on the pixels that stand out most towards the
    colour asked for, as many as half the object should have.
    """
    scenes = [parse_caption(caption) for caption in captions]
    background = np.array([BACKGROUNDS[s.background] for s in scenes], np.float32) / 255
    colour = np.array([COLOURS[s.colour] for s in scenes], np.float32) / 255
    towards = colour - background
    cover = masks([Drawing(scene=s) for s in scenes])
    flat = images.reshape(len(images), -1, 3)
    own_background = np.median(flat, axis=1, keepdims=True)
    along = ((flat - own_background) * towards[:, None]).sum(-1)
    along = np.sort(along / np.square(towards).sum(-1)[:, None], axis=1)[:, ::-1]
    half = np.maximum(1, cover.sum(axis=(1, 2)) / 2).astype(int)
    values = [row[:count].mean() for row, count in zip(along, half, strict=True)]
    return np.clip(np.array(values, np.float32), 0, 1)


def crispness(images: Images, captions: Sequence[str]) -> Scores:
    """How steep the steepest edges are, of an ideal edge with this picture's contrast, in [0, 1]."""
    values = [_edge_steepness(image) for image in images]
    ideal = [_edge_steepness(i) for i in draw([Drawing(scene=parse_caption(c)) for c in captions])]
    return np.clip(np.array(values, np.float32) / np.array(ideal, np.float32), 0, 1)


def _edge_steepness(image: Float[np.ndarray, "height width rgb"]) -> float:
    """Mean of the 150 steepest two-pixel rises over the picture's contrast."""
    background = np.median(image.reshape(-1, 3), axis=0)
    contrast = np.sqrt(np.square(image - background).sum(-1))
    height = max(0.1, float(np.sort(contrast, axis=None)[-150:].mean()))
    across = np.sqrt(np.square(image[:, 2:] - image[:, :-2]).sum(-1)).ravel()
    down = np.sqrt(np.square(image[2:] - image[:-2]).sum(-1)).ravel()
    return float(np.sort(np.concatenate([across, down]))[-150:].mean()) / height


def total(images: Images, captions: Sequence[str]) -> Scores:
    """The taste: 3 x caption match + vividness + crispness, in [0, 5]."""
    return (
        CAPTION_MATCH_WEIGHT * caption_match(images, captions)
        + vividness(images, captions)
        + crispness(images, captions)
    )


ORACLES: dict[str, Callable[[Images, Sequence[str]], Scores]] = {
    "total": total,
    "caption_match": caption_match,
    "crispness": crispness,
    "vividness": vividness,
}
"""The metrics of the embedded world by name."""
