"""Pixels against independent resizings, on every shape and mode of picture."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from stages.metrics.preprocessing import clip_input, hpsv2_input, imagereward_input
from tests.metrics import independent

SHAPES = {
    "square": (300, 300),
    "tall": (451, 200),
    "wide": (130, 333),
    "small": (40, 57),
    "exact": (224, 224),
    "one pixel": (1, 1),
    "line": (3, 700),
    "odd": (225, 228),
    "exact wide": (224, 231),
}
MODES = ("RGB", "RGBA", "L", "P", "LA", "1", "CMYK")
LEVEL = 1 / 255 / 0.2613
"""One of 256 steps of the channel whose unit is smallest; rounding in half may go either way."""


def picture(shape: tuple[int, int]) -> NDArray[np.uint8]:
    rng = np.random.default_rng(sum(shape))
    height, width = shape
    wave = np.sin(
        np.arange(height)[:, None, None] / 9 + np.arange(width)[:, None] / 5 + np.arange(3)
    )
    return np.clip(128 + 90 * wave + rng.normal(0, 25, (height, width, 3)), 0, 255).astype(np.uint8)


CASES = [
    *(pytest.param(Image.fromarray(picture(shape)), id=name) for name, shape in SHAPES.items()),
    *(pytest.param(Image.fromarray(picture((61, 90))).convert(mode), id=mode) for mode in MODES),
]


def rgb(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("image", CASES)
def test_clip_input_is_that_of_transformers(image: Image.Image) -> None:
    wanted = CLIPImageProcessorPil()(image, return_tensors="np")["pixel_values"][0]
    assert np.abs(clip_input(image, 224).numpy() - wanted).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("image", CASES)
def test_imagereward_input_is_that_of_torchvision(image: Image.Image) -> None:
    pixels = rgb(image)
    height, width = pixels.shape[:2]
    # torchvision: Resize(224) cuts the long side's fraction off; CenterCrop rounds half to even
    tall, wide = (
        (224, int(224 * width / height)) if height <= width else (int(224 * height / width), 224)
    )
    resized = independent.resized_as_picture(pixels, tall, wide)
    top, left = round((tall - 224) / 2.0), round((wide - 224) / 2.0)
    wanted = independent.normalised(resized[top : top + 224, left : left + 224] / 255)
    found = imagereward_input(image, 224).numpy()
    assert found.shape == (3, 224, 224)
    assert np.abs(found - wanted).max() < 1.01 * LEVEL
    assert np.mean(np.abs(found - wanted) > 1e-4) < 0.002


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("image", CASES)
def test_hpsv2_input_is_resized_as_numbers_and_padded(image: Image.Image, antialias: bool) -> None:
    pixels = rgb(image) / 255
    height, width = pixels.shape[:2]
    scale = 224 / max(height, width)
    tall, wide = (max(1, round(side * scale)) for side in (height, width))
    inner = independent.resized_as_numbers(pixels, tall, wide, antialias=antialias)
    whole = np.zeros((224, 224, 3))
    top, left = (224 - tall) // 2, (224 - wide) // 2
    whole[top : top + tall, left : left + wide] = inner
    found = hpsv2_input(image, 224, antialias=antialias).numpy()
    assert np.abs(found - independent.normalised(whole)).max() < 2e-4


def test_the_middle_squares_of_clip_and_imagereward_differ_by_a_pixel() -> None:
    image = Image.fromarray(picture((224, 227)))  # three columns too many
    assert (clip_input(image, 224)[..., 1:] == imagereward_input(image, 224)[..., :-1]).all()


def test_arrays_and_images_are_the_same() -> None:
    pixels = picture((70, 50))
    assert (clip_input(pixels, 224) == clip_input(Image.fromarray(pixels), 224)).all()
