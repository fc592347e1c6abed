"""How small a picture's JPEG file is: a reward that needs no weights and has nothing to do with taste."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

Images = UInt8[np.ndarray, "image height width rgb"]
Scores = Float[np.ndarray, " image"]

QUALITY = 95
"""Of the JPEG files (DDPO's published code)."""


def incompressibility(*, images: Images, prompts: Sequence[str]) -> Scores:
    """Size of each picture's JPEG file of quality 95, in kB of 1000 bytes. DDPO, Sec. 5.1."""
    return np.array([_size(image) for image in images], dtype=np.float32) / 1000


def compressibility(*, images: Images, prompts: Sequence[str]) -> Scores:
    """Minus `incompressibility`: plain pictures score high. DDPO, Sec. 5.1."""
    return -incompressibility(images=images, prompts=prompts)


def _size(pixels: UInt8[np.ndarray, "height width rgb"]) -> int:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=QUALITY)
    return file.tell()


SCORERS: dict[str, Callable[[], Callable[..., Scores]]] = {
    "compressibility": lambda: compressibility,
    "incompressibility": lambda: incompressibility,
}
