"""Images as bytes in tables and as arrays in memory."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from stages.core.errors import UserError

Batch = Float[np.ndarray, "image rgb height width"]
Pixels = UInt8[np.ndarray, "height width rgb"]


MAX_PIXELS = 2**25
"""Larger images (8192 x 4096) are refused by their header, before any pixel is decoded."""
KINDS = (
    "PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO",
)  # fmt: skip
"""What is decoded. Pillow knows many more, some by calling other programs (EPS: Ghostscript)."""

ORIENTATION = 0x0112
"""The EXIF tag of how a camera was held."""
SIDEWAYS = 5
"""From this orientation on, width and height are exchanged."""
PREVIEW_SIDE = 64


class ImageError(UserError):
    """Bytes that are no usable image; the message says why."""


def decode_image(data: bytes | None, where: str = "") -> Image.Image:
    """The RGB image in some file's bytes, as a viewer shows it; ImageError for anything else.

    Upright by its EXIF orientation, see-through parts on white, 16 bits cut to 8. The message begins
    with `where` the bytes come from.
    """
    with _named(where), _opened(data) as image:
        return _to_rgb(image)


def looks_like_image(path: Path) -> bool:
    """Whether a file's head is that of an image of a kind that is decoded, whatever it is called."""
    try:
        with Image.open(path, formats=KINDS):
            return True
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError):
        return False


@dataclass(frozen=True)
class Preview:
    """What a readable image file shows."""

    width: int
    height: int
    image: Image.Image
    """The RGB image; of a JPEG file an eighth of its size or more, in half the time."""


def preview_image(data: bytes | None) -> Preview:
    """The image as `decode_image` shows it, perhaps smaller; ImageError where that raises one."""
    with _opened(data) as image:
        width, height = image.size
        if _orientation(image) >= SIDEWAYS:
            width, height = height, width
        image.draft(None, (PREVIEW_SIDE, PREVIEW_SIDE))
        return Preview(width, height, _to_rgb(image))


@contextmanager
def _opened(data: bytes | None) -> Iterator[Image.Image]:
    """The image, not decoded yet. ImageError if it is too large, or for whatever fails inside."""
    if not data:
        raise ImageError("the image has no bytes")
    try:
        with (
            warnings.catch_warnings(action="ignore", category=UserWarning),  # of odd tags
            Image.open(io.BytesIO(data), formats=KINDS) as image,
        ):
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(
                    f"the image is {image.width} x {image.height} = "
                    f"{image.width * image.height / 1e6:.1f} megapixels; at most "
                    f"{MAX_PIXELS / 1e6:.1f} are decoded. Make it smaller"
                )
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            f"the bytes are no readable image: they begin with {data[:12]!r}; expected one of "
            f"{', '.join(KINDS)}"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"the image is too large: {error}") from error
    except Exception as error:  # damaged bytes may raise anything
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise ImageError(f"the bytes are no readable image ({reason})") from error


@contextmanager
def _named(where: str) -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{where}: {error}" if where else str(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if _orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except (SyntaxError, ValueError, TypeError, struct.error):
        return 1  # a tag that says nothing turns nothing


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of 16 bits in [0, 65535], as RGB."""
    if image.mode == "F":
        raise ImageError("the image has floating-point pixels, whose range nobody knows")
    grey = (np.asarray(image).astype(np.int64) / 257).round().clip(0, 255)
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) of the image in some file's bytes; only its header is read.

    ImageError if they are none.
    """
    with _opened(data) as image:
        return image.size


def image_kind(data: bytes, where: str) -> str:
    """The usual ending of an image file's name, from its bytes: 'png', 'jpg', 'webp' ...

    ImageError, which begins with `where` they come from, if they are none.
    """
    with _named(where), _opened(data) as image:
        kind = str(image.format).lower()
    return {"jpeg": "jpg", "mpo": "jpg"}.get(kind, kind)


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """As which files images are kept."""

    kind: Literal["png", "webp", "jpeg"] = "png"
    """'png' and 'webp' keep every pixel; 'jpeg' is some times smaller and does not."""
    quality: int = 95
    """Of JPEG, 1 to 100."""


PNG = ImageFiles()
SAVED_AS: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG", "compress_level": 4},
    "webp": {"format": "WEBP", "lossless": True, "method": 0, "quality": 0},
    "jpeg": {"format": "JPEG", "subsampling": 0},
}
"""Pillow's options. Lossless WebP: `quality` is the effort, 0 the least."""


def encode_image(pixels: Pixels, files: ImageFiles) -> bytes:
    """An image file of the pixels."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"quality": files.quality} if files.kind == "jpeg" else {}
    Image.fromarray(pixels).save(buffer, **SAVED_AS[files.kind], **options)
    return buffer.getvalue()


def encode_png(pixels: Pixels) -> bytes:
    """A PNG file of the pixels."""
    return encode_image(pixels, PNG)


def to_pixels(images: Batch) -> list[Pixels]:
    """8-bit pixels of images in [0, 1]."""
    return list((images * 255).round().astype(np.uint8).transpose(0, 2, 3, 1))


Size = int | tuple[int, int]
"""The side of a square, or height and width, in pixels."""


def geometry(image: Image.Image, size: Size) -> list[int]:
    """What SDXL is told of an image that `to_model_input` fits to `size`, in pixels.

    Original height and width, top and left of the crop in the resized image, target height and
    width. Follows SDXL's micro-conditioning (Podell et al., Sec. 2.2).
    """
    _width, _height, left, top = _fit(image, size)
    return [image.height, image.width, top, left, *_sides(size)]


def to_model_input(images: Sequence[Image.Image], size: Size) -> Batch:
    """Images in [-1, 1] of `size`: resized until the size is covered, then the middle is kept."""
    arrays = [np.asarray(_centre_crop(image, size), np.float32) for image in images]
    return np.stack(arrays).transpose(0, 3, 1, 2) / np.float32(127.5) - 1


def _sides(size: Size) -> tuple[int, int]:
    """(height, width)."""
    return (size, size) if isinstance(size, int) else size


def _centre_crop(image: Image.Image, size: Size) -> Image.Image:
    high, wide = _sides(size)
    if image.size == (wide, high):
        return image
    width, height, left, top = _fit(image, size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + wide, top + high))


def _fit(image: Image.Image, size: Size) -> tuple[int, int, int, int]:
    """(width, height) that just cover `size`, and (left, top) of the middle of that size in it."""
    high, wide = _sides(size)
    factor = max(wide / image.width, high / image.height)
    width, height = max(wide, round(image.width * factor)), max(high, round(image.height * factor))
    return width, height, (width - wide) // 2, (height - high) // 2
