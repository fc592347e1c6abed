"""The known taste of the embedded world, computed from pixels: it plays the human and PickScore.

People here want what the caption says, and like some of what it leaves unsaid: the object on the
left, a pink background. docs/world.md tells who they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from jaxtyping import Float

from stages.shapes.captions import BACKGROUNDS, POSITIONS, Scene, parse_caption
from stages.shapes.renderer import Drawing, Images, draw, masks

Scores = Float[np.ndarray, " image"]
Picture = Float[np.ndarray, "height width rgb"]

LIKED_BACKGROUND = "pink"
LIKED_POSITION = "left"

CAPTION_WEIGHT, APPEAL_WEIGHT = 2.5, 2.5
"""Of the total: what the caption says, and what people like beyond it."""

NEAR_COLOUR = 0.25
"""Root mean square of an sRGB difference, in [0, 1], at which a colour counts 1/e."""

NEAR_PLACE = 10.0
"""Distance in pixels at which a place counts 1/e."""


def caption_match(images: Images, captions: Sequence[str]) -> Scores:
    """How much of what its caption says is in the picture, in [0, 1].

    Against an ideal drawing: object pixels that look right, over all object pixels and all
    background pixels that look wrong. It is an intersection over union in which a pixel of another
    colour counts in part. Of all scenes that the caption allows, the one that matches best counts.
    """
    scores = [
        _match(image, best_scene(image, caption))
        for image, caption in zip(images, captions, strict=True)
    ]
    return np.array(scores, np.float32)


def best_scene(image: Picture, caption: str) -> Scene:
    """Of the scenes that the caption allows, the one that the picture shows best."""
    return max(parse_caption(caption).scenes(), key=lambda scene: _match(image, scene))


def appeal(images: Images, captions: Sequence[str]) -> Scores:
    """How much of what the caption leaves unsaid is as people like it, in [0, 1].

    The mean over background and position, where unsaid. 0 where the caption says both. Nobody
    cares about the size.
    """
    scores = []
    for image, text in zip(images, captions, strict=True):
        caption = parse_caption(text)
        likes = [] if caption.background else [background_liking(image)]
        likes += [] if caption.position else [place_liking(image)]
        scores.append(np.mean(likes) if likes else 0.0)
    return np.array(scores, np.float32)


def total(images: Images, captions: Sequence[str]) -> Scores:
    """The taste: caption match x (2.5 + 2.5 x appeal), in [0, 5]: of what is not there nothing appeals."""
    worth = CAPTION_WEIGHT + APPEAL_WEIGHT * appeal(images, captions)
    return (caption_match(images, captions) * worth).astype(np.float32)


def background_liking(image: Picture) -> float:
    """How near the picture's background is to pink, in (0, 1]."""
    liked = np.array(BACKGROUNDS[LIKED_BACKGROUND], np.float32) / 255
    distance = np.sqrt(np.square(own_background(image) - liked).mean())
    return float(np.exp(-np.square(distance / NEAR_COLOUR)))


def place_liking(image: Picture) -> float:
    """How near the object's middle is to the left's, from side to side, in (0, 1]."""
    distance = object_middle(image) - POSITIONS[LIKED_POSITION][1]
    return float(np.exp(-np.square(distance / NEAR_PLACE)))


def own_background(image: Picture) -> Float[np.ndarray, " rgb"]:
    """The picture's median colour: an object covers less than half of it."""
    return np.median(image.reshape(-1, 3), axis=0)


def object_middle(image: Picture) -> float:
    """Pixels from the picture's middle to the object's, to the right.

    The object is what stands out from the background more than half as much as the 150 pixels
    that do most, each pixel weighted by how much more. 0 where nothing stands out.
    """
    stands_out = np.sqrt(np.square(image - own_background(image)).mean(axis=-1))
    most = np.sort(stands_out, axis=None)[-150:].mean()
    weight = np.maximum(stands_out - most / 2, 0).sum(axis=0)
    axis = np.arange(len(weight)) - (len(weight) - 1) / 2
    return float((weight * axis).sum() / weight.sum()) if weight.sum() > 0 else 0.0


def _match(image: Picture, scene: Scene) -> float:
    ideal, cover = _ideal(scene)
    difference = np.square(image - ideal).mean(axis=-1)
    agreement = np.exp(-difference / NEAR_COLOUR**2)
    hits = (cover * agreement).sum()
    misses = ((1 - cover) * (1 - agreement)).sum()
    return float(hits / (cover.sum() + misses))


@cache
def _ideal(scene: Scene) -> tuple[Picture, Float[np.ndarray, "height width"]]:
    """The picture and the object's share of each pixel."""
    drawings = [Drawing(scene=scene)]
    return draw(drawings)[0], masks(drawings)[0]


ORACLES: dict[str, Callable[[Images, Sequence[str]], Scores]] = {
    "total": total,
    "caption_match": caption_match,
    "appeal": appeal,
}
"""The metrics of the embedded world by name."""
