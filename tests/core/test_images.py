"""Images to bytes, to pixels, and to what a model is given."""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from stages.core.artifacts.images import (
    ORIENTATION,
    ImageError,
    ImageFiles,
    decode_image,
    encode_image,
    encode_png,
    geometry,
    image_kind,
    preview_image,
    to_model_input,
    to_pixels,
)
from tests.builders import encoded


def noise_picture(height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_a_png_gives_back_its_pixels() -> None:
    pixels = noise_picture()
    assert (np.asarray(decode_image(encode_png(pixels))) == pixels).all()


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_a_lossless_file_gives_back_its_pixels(kind: Literal["png", "webp"]) -> None:
    pixels = noise_picture(16, 24)
    data = encode_image(pixels, ImageFiles(kind=kind))
    assert image_kind(data, "here") == kind
    assert (np.asarray(decode_image(data)) == pixels).all()


def test_a_jpeg_is_smaller_and_near_and_follows_its_quality() -> None:
    waves = np.sin(np.arange(64) / 9)
    pixels = 127 + 100 * waves[:, None, None] * waves[None, :, None] * [1.0, 0.5, 0.1]
    pixels = pixels.astype(np.uint8)
    good, poor = (encode_image(pixels, ImageFiles(kind="jpeg", quality=q)) for q in (95, 20))
    assert image_kind(good, "here") == "jpg"
    assert len(poor) < len(good) < len(encode_png(pixels))
    apart = [np.abs(np.asarray(decode_image(f)).astype(int) - pixels).mean() for f in (good, poor)]
    assert 0 < apart[0] < apart[1] < 8


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_plain_image_is_decoded_as_pillow_does(kind: str) -> None:
    data = encoded(noise_picture(), kind)
    assert (decoded(data) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


def test_a_grey_image_has_three_equal_colours() -> None:
    grey = noise_picture()[..., 0]
    assert (decoded(encoded(grey, "PNG")) == grey[..., None]).all()


def test_see_through_parts_are_laid_on_white() -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[..., 0] = 200
    pixels[0, :, 3] = (0, 255)
    pixels[1, :, 3] = (51, 102)  # a fifth, two fifths
    found = decoded(saved(Image.fromarray(pixels)))
    expected = [[(255, 255, 255), (200, 0, 0)], [(244, 204, 204), (233, 153, 153)]]
    assert (np.abs(found.astype(int) - expected) <= 1).all()


def test_a_grey_image_with_alpha_is_laid_on_white() -> None:
    image = Image.fromarray(np.array([[[100, 0], [100, 255]]], np.uint8), "LA")
    assert decoded(saved(image)).tolist() == [[[255] * 3, [100] * 3]]


@pytest.mark.parametrize("is_clear", [False, True])
def test_a_palette_image_has_its_colours_and_its_clear_colour_is_white(is_clear: bool) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    data = saved(image, transparency=1) if is_clear else saved(image)
    blue = [255, 255, 255] if is_clear else [0, 0, 255]
    assert decoded(data).tolist() == [[[255, 0, 0], blue]]


def test_a_cmyk_image_has_its_colours() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow make red
    found = decoded(saved(image, "JPEG", quality=95))
    assert (np.abs(found.astype(int) - (255, 0, 0)) <= 4).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_cut_to_eight(kind: str) -> None:
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    data = saved(Image.fromarray(values), kind)
    assert decoded(data)[..., 0].tolist() == [[0, 1, 128, 255]]


def test_pixels_without_a_known_range_are_refused() -> None:
    with pytest.raises(ImageError, match="floating-point"):
        decode_image(saved(Image.new("F", (4, 4)), "TIFF"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_is_turned_as_its_exif_says(kind: str) -> None:
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255  # left half white
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the camera was turned: show it turned clockwise
    found = decoded(saved(Image.fromarray(pixels), kind, exif=exif))
    assert found.shape == (32, 16, 3)
    assert found[:14].min() > 200  # the left half is on top now
    assert found[18:].max() < 55


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_preview_shows_the_image_and_knows_its_size(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    coarse = np.repeat(np.repeat(noise_picture(4, 8), 128, 0), 128, 1)  # 1024 x 512
    data = saved(Image.fromarray(coarse), kind, exif=exif)
    whole, preview = decode_image(data), preview_image(data)
    assert (preview.width, preview.height) == whole.size
    sides = (preview.image.width / preview.width, preview.image.height / preview.height)
    assert sides == ((1 / 8, 1 / 8) if kind == "JPEG" else (1, 1))
    found, expected = (
        np.asarray(i.resize((8, 8), Image.Resampling.BOX)).astype(int)
        for i in (preview.image, whole)
    )
    assert np.abs(found - expected).max() <= 4


@pytest.mark.parametrize("size", [300, 5_000, 20_000])
@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("is_progressive", [False, True])
def test_a_preview_notices_a_cut_off_file_as_decoding_does(
    size: int, subsampling: int, is_progressive: bool
) -> None:
    image = Image.fromarray(noise_picture(256, 256))
    data = saved(image, "JPEG", subsampling=subsampling, progressive=is_progressive)
    assert len(data) > 20_000
    for cut in (data[:size], data[: len(data) - size]):
        for decode in (decode_image, preview_image):
            with pytest.raises(ImageError, match="no readable image"):
                decode(cut)


def test_an_exif_block_that_says_nothing_turns_nothing() -> None:
    data = saved(Image.fromarray(noise_picture()), "JPEG", exif=b"Exif\x00\x00garbage")
    assert decoded(data).shape == (8, 8, 3)


@pytest.mark.parametrize("size", [(8000, 5000), (10_000, 10_000), (20_000, 20_000)])
def test_a_bomb_is_refused_with_its_size_before_it_is_decoded(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = saved(Image.new("1", size))
    assert len(data) < 200_000

    def refuse(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    with pytest.raises(ImageError, match=f"{size[0]} x {size[1]}|{size[0] * size[1]} pixels"):
        decode_image(data)


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


def test_images_are_fitted_to_sizes_that_are_not_square() -> None:
    rows = np.repeat(np.arange(100, dtype=np.uint8), 60).reshape(100, 60)  # 100 high, 60 wide
    picture = Image.fromarray(np.stack([rows] * 3, axis=-1))
    found = to_model_input([picture], (20, 30))  # covered at half the size: 50 high, 30 wide
    assert found.shape == (1, 3, 20, 30)
    expected = (
        2 * np.arange(15, 35) + 0.5
    ) / 127.5 - 1  # the middle 20 of 50 rows, each the mean of two
    np.testing.assert_allclose(found[0, 0, :, 0], expected, atol=0.6 / 127.5)
    assert geometry(picture, (20, 30)) == [100, 60, 15, 0, 20, 30]
    assert geometry(picture, 30) == geometry(picture, (30, 30))
