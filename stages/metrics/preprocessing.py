"""Pictures as the metrics' networks were shown them: the same pixels as the published code's.

Each published scorer resizes in its own way, and a wrong one moves every score by more than an
iteration of SAIL does. Everything here is Pillow and one interpolation of torch; no torchvision.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of red, green and blue in CLIP's training pictures; ImageReward's too."""

Picture = Image.Image | NDArray[np.uint8]
"""An image of any mode, or an array of height x width x rgb."""


def as_rgb(picture: Picture) -> Image.Image:
    """The picture in RGB; transparency is dropped, as the published code does."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    return image.convert("RGB")


def clip_input(picture: Picture, size: int) -> Float[Tensor, "rgb height width"]:
    """Short side to `size`, the middle square, normalised, as transformers' CLIPImageProcessor.

    An odd pixel is cut off below and to the right.
    """
    image = _shortest_edge(as_rgb(picture), size)
    left, top = ((side - size) // 2 for side in image.size)
    return _normalised(_to_tensor(image.crop((left, top, left + size, top + size))))


def imagereward_input(picture: Picture, size: int) -> Float[Tensor, "rgb height width"]:
    """Short side to `size`, the middle square, normalised, as torchvision's CenterCrop.

    Half pixels are rounded to even, so that the square lies one pixel from CLIP's at times.
    """
    image = _shortest_edge(as_rgb(picture), size)
    left, top = (round((side - size) / 2) for side in image.size)
    return _normalised(_to_tensor(image.crop((left, top, left + size, top + size))))


def hpsv2_input(
    picture: Picture, size: int, *, antialias: bool
) -> Float[Tensor, "rgb height width"]:
    """Long side to `size`, resized as numbers and not as a picture, black borders, normalised.

    Nothing is cut off. Values may leave [0, 1] a little, as they do in the published code.
    """
    pixels = _to_tensor(as_rgb(picture))
    height, width = pixels.shape[1:]
    factor = size / max(height, width)
    if factor != 1:
        inner = (max(1, round(height * factor)), max(1, round(width * factor)))
        pixels = functional.interpolate(
            pixels[None], inner, mode="bicubic", align_corners=False, antialias=antialias
        )[0]
    below, right = size - pixels.shape[1], size - pixels.shape[2]
    borders = (right // 2, right - right // 2, below // 2, below - below // 2)
    return _normalised(functional.pad(pixels, borders))


def _shortest_edge(image: Image.Image, size: int) -> Image.Image:
    short, long = sorted(image.size)
    other = int(size * long / short)  # cut off, not rounded, in both libraries
    wanted = (size, other) if image.width <= image.height else (other, size)
    return image if image.size == wanted else image.resize(wanted, Image.Resampling.BICUBIC)


def _to_tensor(image: Image.Image) -> Tensor:
    pixels: Any = np.array(image, np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255


def _normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std
