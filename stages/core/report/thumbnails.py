"""Images from tables as data URIs that are small enough for a page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image

from stages.core.artifacts.images import decode_image

KEPT_SIDE = 128
"""Images up to this many pixels a side are shown as they are, pixel by pixel."""

SHRUNK_SIDE = 256
"""Larger ones are shrunk to this side: twice what the page shows, for dense screens."""


@dataclass(frozen=True)
class Thumbnail:
    """An image ready for a page."""

    uri: str
    is_small: bool
    """Whether it has its original pixels, to be shown without smoothing."""


def thumbnail(data: bytes | None, where: str) -> Thumbnail:
    """A lossless PNG of a small image, a JPEG of a large one's reduction.

    Always encoded anew, so that nothing but an image reaches the page. ImageError says `where` bytes
    that are no readable image come from.
    """
    image = decode_image(data, where)
    if max(image.size) <= KEPT_SIDE:
        return Thumbnail(_uri(image, "PNG"), is_small=True)
    image.thumbnail((SHRUNK_SIDE, SHRUNK_SIDE), Image.Resampling.LANCZOS)
    return Thumbnail(_uri(image, "JPEG"), is_small=False)


def _uri(image: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    options = {"optimize": True} if kind == "PNG" else {"quality": 85}
    image.save(buffer, format=kind, **options)
    text = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{text}"
