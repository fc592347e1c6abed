"""Images to bytes, to pixels, and to what a model is given."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from stages.core.images import ImageError, decode_image, encode_png, to_model_input, to_pixels
from tests.builders import encoded


def noise_picture(height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_a_png_gives_back_its_pixels() -> None:
    pixels = noise_picture()
    assert (np.asarray(decode_image(encode_png(pixels))) == pixels).all()


def test_grey_and_transparent_images_become_rgb() -> None:
    grey = encoded(noise_picture()[..., 0], "PNG")
    clear = encoded(np.dstack([noise_picture(), noise_picture()[..., :1]]), "PNG")
    assert decode_image(grey).mode == decode_image(clear).mode == "RGB"


@pytest.mark.parametrize("data", [None, b"", b"no image", encoded(noise_picture(64, 64))[:300]])
def test_bytes_that_are_no_image_are_refused(data: bytes | None) -> None:
    with pytest.raises(ImageError, match="no bytes|no readable image"):
        decode_image(data)


def test_model_input_spans_minus_1_to_1_and_to_pixels_undoes_it() -> None:
    pixels = noise_picture()
    values = to_model_input([Image.fromarray(pixels)], 8)
    assert values.dtype == np.float32
    assert values.shape == (1, 3, 8, 8)
    assert values[0, 1, 2, 3] == pytest.approx(pixels[2, 3, 1] / 127.5 - 1)
    assert (to_pixels(values / 2 + np.float32(0.5))[0] == pixels).all()


def test_a_wide_image_keeps_its_middle() -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    assert (to_model_input([Image.fromarray(wide)], 8) == 1).all()


@pytest.mark.parametrize("size", [(31, 97), (100, 33), (7, 5)])
def test_any_size_becomes_the_models_size(size: tuple[int, int]) -> None:
    assert to_model_input([Image.new("RGB", size)], 16).shape == (1, 3, 16, 16)
