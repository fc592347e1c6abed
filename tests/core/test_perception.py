"""The perceptual distance by hand, against a plain re-derivation, and by what an eye would say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from stages.core.evaluation.perception import (
    lab_levels,
    linear_light,
    perceptual_distance,
    reduce,
    to_lab,
)

Pixels = NDArray[np.uint8]


def plain(*rgb: int, side: int = 16) -> Pixels:
    return np.full((side, side, 3), rgb, np.uint8)


def distance(first: Pixels, second: Pixels) -> float:
    return perceptual_distance(lab_levels(first), lab_levels(second))


@pytest.mark.parametrize(
    ("rgb", "lab"),
    [  # as colour tables print them, sRGB under D65
        ((0, 0, 0), (0, 0, 0)),
        ((255, 255, 255), (100, 0, 0)),
        ((128, 128, 128), (53.585, 0, 0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
    ],
)
def test_lab_of_known_colours(rgb: tuple[int, ...], lab: tuple[float, ...]) -> None:
    found = to_lab(linear_light(plain(*rgb, side=1)))[0, 0]
    assert found == pytest.approx(lab, abs=0.02)


def test_plain_pictures_differ_by_their_colours_at_every_distance() -> None:
    assert distance(plain(0, 0, 0), plain(255, 255, 255)) == pytest.approx(100)
    assert distance(plain(9, 9, 9), plain(9, 9, 9)) == 0
    red, blue = (53.24, 80.09, 67.20), (32.30, 79.19, -107.86)
    expected = math.dist(red, blue)  # 176.3
    assert distance(plain(255, 0, 0), plain(0, 0, 255)) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        ((64, 64), [64, 32, 16, 8]),
        ((512, 768), [64, 32, 16, 8]),
        ((5, 9), [5]),
        ((20, 90), [20, 10]),
    ],
)
def test_levels_go_from_64_to_8(shape: tuple[int, int], sides: list[int]) -> None:
    levels = lab_levels(np.zeros((*shape, 3), np.uint8))
    assert [min(level.shape[:2]) for level in levels] == sides


def test_a_chequered_picture_is_grey_from_afar() -> None:
    chequered = np.indices((64, 64)).sum(axis=0) % 2
    first = np.repeat((255 * chequered)[..., None], 3, axis=2).astype(np.uint8)
    near, far = lab_levels(first)[0], lab_levels(first)[1]
    assert set(np.round(near[..., 0], 6).ravel().tolist()) == {0.0, 100.0}
    # half of white's light: L = 116 * 0.5^(1/3) - 16
    assert far[4:-4, 4:-4, 0] == pytest.approx(116 * 0.5 ** (1 / 3) - 16, abs=1e-6)
    # its negative differs by 100 close by, and not at all from further away
    assert distance(first, 255 - first) == pytest.approx(100 / 4, abs=1.5)


def by_loops(image: Pixels) -> list[list[list[tuple[float, ...]]]]:
    """The levels pixel by pixel, in plain Python."""
    kernel = {-2: 1 / 16, -1: 4 / 16, 0: 6 / 16, 1: 4 / 16, 2: 1 / 16}

    def light(value: int) -> float:
        code = value / 255
        return code / 12.92 if code <= 0.04045 else ((code + 0.055) / 1.055) ** 2.4

    def mirrored(place: int, size: int) -> int:
        place = abs(place)
        return place if place < size else 2 * (size - 1) - place

    def colour(rgb: tuple[float, ...]) -> tuple[float, ...]:
        rows = (
            (0.4124564, 0.3575761, 0.1804375),
            (0.2126729, 0.7151522, 0.0721750),
            (0.0193339, 0.1191920, 0.9503041),
        )
        xyz = [sum(a * b for a, b in zip(row, rgb, strict=True)) / sum(row) for row in rows]
        f = [t ** (1 / 3) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116 for t in xyz]
        return (116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2]))

    rows = [[tuple(light(value) for value in pixel) for pixel in row] for row in image.tolist()]
    levels = [[[colour(pixel) for pixel in row] for row in rows]]
    while min(len(rows), len(rows[0])) >= 16:
        height, width = len(rows), len(rows[0])
        rows = [
            [
                tuple(
                    sum(
                        a * b * rows[mirrored(y + i, height)][mirrored(x + j, width)][channel]
                        for i, a in kernel.items()
                        for j, b in kernel.items()
                    )
                    for channel in range(3)
                )
                for x in range(0, width, 2)
            ]
            for y in range(0, height, 2)
        ]
        levels.append([[colour(pixel) for pixel in row] for row in rows])
    return levels


def test_the_distance_equals_plain_loops() -> None:
    first, second = np.random.default_rng(0).integers(0, 256, (2, 17, 34, 3)).astype(np.uint8)
    means = []
    for one, other in zip(by_loops(first), by_loops(second), strict=True):
        pixels = [
            math.dist(a, b)
            for rows in zip(one, other, strict=True)
            for a, b in zip(*rows, strict=True)
        ]
        means.append(sum(pixels) / len(pixels))
    assert len(means) == 2
    assert distance(first, second) == pytest.approx(sum(means) / 2, rel=1e-9)


def test_lab_agrees_with_littlecms() -> None:
    """Roughly: Pillow's colour management has its CIELAB under D50, in 8 bits."""
    rgb = np.random.default_rng(1).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.profileToProfile(Image.fromarray(rgb), *profiles, outputMode="LAB")
    assert lab is not None
    coded = np.asarray(lab, np.float64)
    signed = np.where(coded[..., 1:] > 127, coded[..., 1:] - 256, coded[..., 1:])
    found = to_lab(linear_light(rgb))
    assert np.abs(found[..., 0] - coded[..., 0] * 100 / 255).max() < 4
    assert np.abs(found[..., 1:] - signed).mean() < 5
    assert np.corrcoef(found[..., 1:].ravel(), signed.ravel())[0, 1] > 0.99


def test_noise_counts_less_and_a_moved_shape_more_than_in_pixels() -> None:
    rng = np.random.default_rng(2)
    grey = plain(128, 128, 128, side=256)
    noisy = np.clip(grey + rng.normal(0, 40, grey.shape), 0, 255).astype(np.uint8)
    here, there = grey.copy(), grey.copy()
    here[32:96, 32:96] = (200, 40, 40)
    there[160:224, 160:224] = (200, 40, 40)

    def pixels(a: Pixels, b: Pixels) -> float:
        return float(np.sqrt(np.square(a / 255 - b / 255.0).mean()))

    assert pixels(grey, noisy) > pixels(here, there)
    assert distance(grey, noisy) < distance(here, there)


def test_halving_keeps_the_light() -> None:
    light = np.random.default_rng(3).random((32, 48, 3))
    assert reduce(np.full((32, 48, 3), 0.3)) == pytest.approx(0.3)
    assert reduce(light).shape == (16, 24, 3)
    assert reduce(light).mean() == pytest.approx(light.mean(), abs=0.02)
