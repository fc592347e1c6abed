"""Filters that know no caption: what could buy the taste without a better model.

Each takes a picture and gives a picture. `benchmarks/world.py` measures what each adds to the taste of
the base's own pictures; `tests/shapes/test_filters.py` bounds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageEnhance, ImageFilter

from stages.shapes.captions import BACKGROUNDS
from stages.shapes.oracle import LIKED_BACKGROUND, Picture, own_background
from stages.shapes.renderer import Images

Filter = Callable[[Picture], Picture]


def with_pillow(change: Callable[[Image.Image], Image.Image], image: Picture) -> Picture:
    """A picture that Pillow has changed."""
    before = Image.fromarray((image * 255).round().astype(np.uint8))
    return (np.asarray(change(before)) / 255).astype(np.float32)


def enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance], factor: float) -> Filter:
    """Pillow's enhancement of one kind: 1 changes nothing."""
    return partial(with_pillow, lambda image: kind(image).enhance(factor))


def filtered(kernel: ImageFilter.Filter) -> Filter:
    """Pillow's filter."""
    return partial(with_pillow, lambda image: image.filter(kernel))


def object_share(image: Picture) -> Float[np.ndarray, "height width one"]:
    """How surely each pixel is the object's and not the background's, in [0, 1], by its colour alone."""
    stands_out = np.sqrt(np.square(image - own_background(image)).mean(axis=-1))
    most = max(np.sort(stands_out, axis=None)[-150:].mean(), 1e-3)
    return np.clip(4 * stands_out / most - 1, 0, 1)[..., None]


def two_colours(image: Picture) -> Picture:
    """Object and background in one colour each: their own means."""
    share = (object_share(image) > 0.5).astype(np.float32)
    if not 0 < share.mean() < 1:
        return image
    means = [(image * w).sum(axis=(0, 1)) / w.sum() for w in (share, 1 - share)]
    return share * means[0] + (1 - share) * means[1]


def dots(image: Picture) -> Picture:
    """150 black or white dots, in the same places in every picture."""
    rng = np.random.default_rng(0)
    result = image.copy()
    down, right = rng.integers(0, len(image), (2, 150))
    result[down, right] = rng.integers(0, 2, (150, 1))
    return result


def noise(image: Picture) -> Picture:
    """Noise of 5 % of the range, the same in every picture."""
    added = np.random.default_rng(0).normal(0, 0.05, image.shape)
    return np.clip(image + added, 0, 1).astype(np.float32)


def painted(amount: float, image: Picture) -> Picture:
    """The background blended with the colour that people like."""
    share = object_share(image)
    liked = np.array(BACKGROUNDS[LIKED_BACKGROUND], np.float32) / 255
    backdrop = (1 - amount) * image + amount * liked
    return (share * image + (1 - share) * backdrop).astype(np.float32)


def moved(pixels: int, image: Picture) -> Picture:
    """The whole picture moved to the left; its right edge is repeated."""
    return np.concatenate([image[:, pixels:], np.repeat(image[:, -1:], pixels, axis=1)], axis=1)


FILTERS: dict[str, Filter] = {
    "contrast x 1.1": enhanced(ImageEnhance.Contrast, 1.1),
    "contrast x 1.25": enhanced(ImageEnhance.Contrast, 1.25),
    "contrast x 1.5": enhanced(ImageEnhance.Contrast, 1.5),
    "contrast x 0.9": enhanced(ImageEnhance.Contrast, 0.9),
    "saturation x 1.25": enhanced(ImageEnhance.Color, 1.25),
    "saturation x 1.5": enhanced(ImageEnhance.Color, 1.5),
    "brightness x 1.1": enhanced(ImageEnhance.Brightness, 1.1),
    "unsharp mask": filtered(ImageFilter.UnsharpMask(radius=2, percent=100, threshold=0)),
    "blur": filtered(ImageFilter.GaussianBlur(1)),
    "median of 3 x 3": filtered(ImageFilter.MedianFilter(3)),
    "two colours": two_colours,
    "150 dots": dots,
    "noise": noise,
    "background painted pink, half": partial(painted, 0.5),
    "background painted pink, whole": partial(painted, 1.0),
    "moved 3 pixels to the left": partial(moved, 3),
    "moved 7 pixels to the left": partial(moved, 7),
    "moved 14 pixels to the left": partial(moved, 14),
    "painted pink and moved 14 pixels": lambda image: moved(14, painted(1.0, image)),
}
"""By name: of one picture each."""


def filtered_pictures(images: Images) -> Iterator[tuple[str, Images]]:
    """Each filter's name, and the pictures after it."""
    for name, each in FILTERS.items():
        yield name, np.stack([each(image) for image in images]).astype(np.float32)
