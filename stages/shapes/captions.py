"""The captions of the embedded world: colour and shape always; size, position, background said or not."""

from __future__ import annotations

from collections.abc import Container
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
    "pink": (250, 150, 185),
}
"""sRGB values of the backgrounds."""

CAN_BE_UNSAID = ("size", "position", "background")
"""What a caption may leave open."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What one picture shows."""

    size: str
    colour: str
    shape: str
    position: str
    background: str

    def caption(self, *, unsaid: Container[str] = ()) -> Caption:
        """The caption that says this scene but for the attributes named."""
        said = {name: None if name in unsaid else getattr(self, name) for name in CAN_BE_UNSAID}
        return Caption(colour=self.colour, shape=self.shape, **said)

    def __str__(self) -> str:
        return str(self.caption())


@dataclass(frozen=True, kw_only=True)
class Caption:
    """What one caption asks for; None is what it leaves unsaid."""

    size: str | None = None
    colour: str
    shape: str
    position: str | None = None
    background: str | None = None

    def __str__(self) -> str:
        words = [word for word in (self.size, self.colour, self.shape) if word]
        text = f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"
        if self.position:
            text += f" {POSITIONS[self.position][0]}"
        if self.background:
            text += f" on a {self.background} background"
        return text

    def scenes(self) -> list[Scene]:
        """The scenes that it allows, in a fixed order."""
        return [
            Scene(size=size, colour=self.colour, shape=self.shape, position=place, background=back)
            for size, place, back in product(
                [self.size] if self.size else SIZES,
                [self.position] if self.position else POSITIONS,
                [self.background] if self.background else BACKGROUNDS,
            )
        ]


def all_scenes() -> list[Scene]:
    """Every scene, in a fixed order (1,440 of them)."""
    return [
        Scene(size=size, colour=colour, shape=shape, position=position, background=background)
        for size, colour, shape, position, background in product(
            SIZES, COLOURS, SHAPES, POSITIONS, BACKGROUNDS
        )
    ]


def all_captions() -> list[Caption]:
    """Every caption, in a fixed order (3,240 of them)."""
    return [
        Caption(size=size, colour=colour, shape=shape, position=position, background=background)
        for size, colour, shape, position, background in product(
            (*SIZES, None), COLOURS, SHAPES, (*POSITIONS, None), (*BACKGROUNDS, None)
        )
    ]


def open_captions() -> list[Caption]:
    """The captions that leave position or background unsaid, in a fixed order (1,080 of them)."""
    return [caption for caption in all_captions() if not (caption.position and caption.background)]


_CAPTION_OF_TEXT = {str(caption): caption for caption in all_captions()}


def parse_caption(text: str) -> Caption:
    """What a caption of the embedded world asks for; ValueError for any other text."""
    caption = _CAPTION_OF_TEXT.get(text.strip())
    if caption is None:
        raise ValueError(
            f"{text!r} is not a caption of the embedded world; expected one like "
            f"'{all_scenes()[0]}' or '{open_captions()[-1]}'. Its metrics score only its own "
            "captions."
        )
    return caption
