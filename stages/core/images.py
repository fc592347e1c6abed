"""Images as bytes in tables and as arrays in memory."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from stages.core.errors import UserError

Batch = Float[NDArray[np.float32], "image rgb height width"]
Pixels = UInt8[NDArray[np.uint8], "height width rgb"]


class ImageError(UserError):
    """Bytes that are no usable image; the message says why."""


def decode_image(data: bytes | None) -> Image.Image:
    """The RGB image in some file's bytes; ImageError for anything else."""
    if not data:
        raise ImageError("the image has no bytes")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"the bytes are no readable image ({error})") from error
    except Image.DecompressionBombError as error:
        raise ImageError(str(error)) from error


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) of the image in some file's bytes; only its header is read."""
    with Image.open(io.BytesIO(data)) as image:
        return image.size


def encode_png(pixels: Pixels) -> bytes:
    """A PNG file of the pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=4)
    return buffer.getvalue()


def to_pixels(images: Batch) -> list[Pixels]:
    """8-bit pixels of images in [0, 1]."""
    return list((images * 255).round().astype(np.uint8).transpose(0, 2, 3, 1))


def geometry(image: Image.Image, size: int) -> list[int]:
    """What SDXL is told of an image that `to_model_input` fits to `size`, in pixels.

    Original height and width, top and left of the crop in the resized image, target height and
    width. Follows SDXL's micro-conditioning (Podell et al., Sec. 2.2).
    """
    _width, _height, left, top = _fit(image, size)
    return [image.height, image.width, top, left, size, size]


def to_model_input(images: Sequence[Image.Image], size: int) -> Batch:
    """Images in [-1, 1] at `size` x `size`: the short side is resized, the middle is kept."""
    arrays = [np.asarray(_centre_crop(image, size), np.float32) for image in images]
    return np.stack(arrays).transpose(0, 3, 1, 2) / np.float32(127.5) - 1


def _centre_crop(image: Image.Image, size: int) -> Image.Image:
    if image.size == (size, size):
        return image
    width, height, left, top = _fit(image, size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + size, top + size))


def _fit(image: Image.Image, size: int) -> tuple[int, int, int, int]:
    """(width, height) with a short side of `size`, and (left, top) of the middle square in it."""
    factor = size / min(image.size)
    width, height = (max(size, round(side * factor)) for side in image.size)
    return width, height, (width - size) // 2, (height - size) // 2
