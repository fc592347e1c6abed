"""The captions of the embedded world: every combination of size, colour, shape, position and background."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

IMAGE_SIZE = 64
"""Pictures are square, this many pixels wide."""

SIZES: dict[str, float] = {"small": 10.5, "large": 16.5}
"""Radius of the object in pixels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 45),
    "green": (45, 165, 75),
    "blue": (45, 85, 220),
    "yellow": (245, 215, 50),
    "purple": (150, 60, 190),
    "orange": (245, 140, 35),
}
"""sRGB values of the object colours."""

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross", "diamond", "ring")

POSITIONS: dict[str, tuple[str, float, float]] = {
    "centre": ("in the centre", 0.0, 0.0),
    "left": ("on the left", -14.0, 0.0),
    "right": ("on the right", 14.0, 0.0),
    "top": ("at the top", 0.0, -14.0),
    "bottom": ("at the bottom", 0.0, 14.0),
}
"""How the caption says it, and the offset of the object from the middle in pixels (right, down)."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (15, 15, 20),
    "white": (245, 245, 240),
    "grey": (125, 128, 130),
    "pink": (250, 190, 205),
}
"""sRGB values of the backgrounds."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What one caption asks for."""

    size: str
    colour: str
    shape: str
    position: str
    background: str

    def __str__(self) -> str:
        where = POSITIONS[self.position][0]
        return f"a {self.size} {self.colour} {self.shape} {where} on a {self.background} background"


def all_scenes() -> list[Scene]:
    """Every scene of the embedded world, in a fixed order (1,440 of them)."""
    return [
        Scene(size=size, colour=colour, shape=shape, position=position, background=background)
        for size, colour, shape, position, background in product(
            SIZES, COLOURS, SHAPES, POSITIONS, BACKGROUNDS
        )
    ]


_SCENE_OF_CAPTION = {str(scene): scene for scene in all_scenes()}


def parse_caption(caption: str) -> Scene:
    """The scene a caption of the embedded world asks for; ValueError for any other text."""
    scene = _SCENE_OF_CAPTION.get(caption.strip())
    if scene is None:
        raise ValueError(
            f"{caption!r} is not a caption of the embedded world; expected one like "
            f"'{all_scenes()[0]}'. Its metrics score only its own captions."
        )
    return scene
