"""Images from tables as data URIs that are small enough for a page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image

from stages.core.artifacts.images import decode_image

KEPT_SIDE = 128
"""Images up to this many pixels a side are shown as they are, pixel by pixel."""

SIDES = (512, 384, 256, 192, 128)
"""Larger ones are shrunk to the first of these sides whose file is small enough."""

PAGE_BYTES = 20_000_000
"""Of all pictures of a page; its figures and words come on top."""

MOST_BYTES = 150_000
"""Of one picture, however few there are."""


@dataclass(frozen=True)
class Thumbnail:
    """An image ready for a page."""

    uri: str
    width: int
    height: int
    is_small: bool
    """Whether it has its original pixels, to be shown without smoothing."""


def bytes_each(num_pictures: int) -> int:
    """How many bytes each picture of a page may have, so that the page stays below `PAGE_BYTES`."""
    return min(MOST_BYTES, PAGE_BYTES // max(1, num_pictures))


def thumbnail(data: bytes | None, where: str, max_bytes: int = MOST_BYTES) -> Thumbnail:
    """A lossless PNG of a small image, a JPEG of a large one's reduction, in that many bytes.

    Only the smallest of `SIDES` may be larger. Always encoded anew, so that nothing but an image
    reaches the page. ImageError says `where` bytes that are no readable image come from.
    """
    image = decode_image(data, where)
    if max(image.size) <= KEPT_SIDE:
        return Thumbnail(_uri(image, "PNG"), *image.size, is_small=True)
    for side in SIDES:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        uri = _uri(image, "JPEG")
        if len(uri) <= max_bytes:
            break
    return Thumbnail(uri, *image.size, is_small=False)


def _uri(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    options = {"optimize": True} if kind == "PNG" else {"quality": 85}
    image.save(buffer, format=kind, **options)
    text = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{text}"
