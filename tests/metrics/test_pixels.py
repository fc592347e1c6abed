"""Pixel metrics against numbers worked out by hand."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from stages.metrics import load_scorer
from stages.metrics.compression import compressibility
from stages.metrics.pixels import colourfulness, sharpness


def flat(red: int, green: int, blue: int) -> np.ndarray:
    return np.full((1, 8, 8, 3), (red, green, blue), np.uint8)


def test_colourfulness_of_flat_pictures() -> None:
    # red: opponents 255 and 127.5, no spread
    expected = 0.3 * (255**2 + 127.5**2) ** 0.5
    assert colourfulness(images=flat(255, 0, 0), prompts=["a"])[0] == pytest.approx(expected)
    assert colourfulness(images=flat(90, 90, 90), prompts=["a"])[0] == 0


def test_colourfulness_adds_the_spread_of_the_opponents() -> None:
    image = np.zeros((1, 2, 2, 3), np.uint8)
    image[0, 0] = (100, 0, 50)  # opponents 100 and 0
    # means 50 and 0, standard deviations 50 and 0
    assert colourfulness(images=image, prompts=["a"])[0] == pytest.approx(50 + 0.3 * 50)


def test_sharpness_of_a_single_dot_and_of_its_blur() -> None:
    image = np.zeros((1, 5, 5, 3), np.uint8)
    image[0, 2, 2] = 100
    # the Laplacian of the inner 3 x 3: -400 in the middle, 100 at its four sides, 0 at the corners
    expected = np.log1p(np.var([-400, 100, 100, 100, 100, 0, 0, 0, 0]))
    assert sharpness(images=image, prompts=["a"])[0] == pytest.approx(expected)
    image[0, 1:4, 1:4] = 11
    assert sharpness(images=image, prompts=["a"])[0] < expected
    assert sharpness(images=flat(1, 2, 3), prompts=["a"])[0] == 0


def test_they_are_metrics_by_name() -> None:
    assert load_scorer("colourfulness") is colourfulness
    assert load_scorer("sharpness") is sharpness


def test_compressibility_is_minus_the_kilobytes_of_a_jpeg_of_quality_95() -> None:
    noisy = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    images = np.concatenate([np.full((1, 64, 64, 3), 90, np.uint8), noisy])
    found = compressibility(images=images, prompts=["a", "b"])
    file = io.BytesIO()
    Image.fromarray(noisy[0]).save(file, "JPEG", quality=95)
    assert found[1] == pytest.approx(-len(file.getvalue()) / 1000)
    assert found[1] < found[0] < 0
    assert np.array_equal(
        load_scorer("incompressibility")(images=images, prompts=["a", "b"]), -found
    )
