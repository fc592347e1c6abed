"""The embedded world: its captions, its known taste, and the committed pipeline."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from stages.core.method.noising import generator
from stages.core.method.sampling import sample_latents
from stages.core.models.adapter import DiffusionModel
from stages.shapes.captions import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    Caption,
    Scene,
    all_captions,
    all_scenes,
    open_captions,
    parse_caption,
)
from stages.shapes.oracle import (
    ORACLES,
    appeal,
    background_liking,
    caption_match,
    object_middle,
    place_liking,
    total,
)
from stages.shapes.renderer import Drawing, draw, web_like

SCENES = all_scenes()
SOME = SCENES[::29]
CAPTIONS = [str(scene) for scene in SOME]
IDEAL = draw([Drawing(scene=scene) for scene in SOME])


def drawn(**changes: object) -> np.ndarray:
    return draw([Drawing(scene=scene, **changes) for scene in SOME])  # type: ignore[arg-type]


def one(**changes: str) -> np.ndarray:
    """The ideal picture of one scene."""
    scene = Scene(size="large", colour="green", shape="cross", position="top", background="grey")
    return draw([Drawing(scene=replace(scene, **changes))])


def test_all_captions_differ_and_give_back_what_they_say() -> None:
    captions = all_captions()
    assert len({str(caption) for caption in captions}) == len(captions) == 3240
    assert [parse_caption(str(caption)) for caption in captions] == captions
    assert len(open_captions()) == 1080
    assert len(SCENES) == len({str(scene) for scene in SCENES}) == 1440


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "a small red ring at the top on a pink background",
            {"size": "small", "position": "top", "background": "pink"},
        ),
        ("a red ring on the left", {"position": "left"}),
        ("a large red ring on a black background", {"size": "large", "background": "black"}),
        ("a red ring", {}),
    ],
)
def test_a_hand_written_caption_says_this_and_leaves_the_rest_open(
    text: str, says: dict[str, str]
) -> None:
    assert parse_caption(f"  {text} \n") == Caption(colour="red", shape="ring", **says)
    assert str(Caption(colour="red", shape="ring", **says)) == text


def test_a_colour_that_begins_with_a_vowel_has_its_article() -> None:
    assert str(Caption(colour="orange", shape="ring")) == "an orange ring"
    assert str(Caption(size="large", colour="orange", shape="ring")) == "a large orange ring"


def test_a_caption_allows_every_scene_that_says_it() -> None:
    allowed = parse_caption("a green cross at the top").scenes()
    assert len(set(allowed)) == len(allowed) == len(BACKGROUNDS) * 2
    for scene in allowed:
        assert str(scene.caption(unsaid=("size", "background"))) == "a green cross at the top"


def test_other_text_is_no_caption() -> None:
    with pytest.raises(ValueError, match="'a red hat' is not a caption.*like 'a small red circle"):
        parse_caption("a red hat")


def test_the_ideal_picture_of_every_scene_matches_every_caption_that_allows_it() -> None:
    for caption in all_captions()[::7]:
        scenes = caption.scenes()
        images = draw([Drawing(scene=scene) for scene in scenes])
        matches = caption_match(images, [str(caption)] * len(scenes))
        np.testing.assert_allclose(matches, 1.0, atol=1e-3)


def test_the_best_picture_of_every_open_caption_scores_5() -> None:
    liked = {"position": "left", "background": "pink"}
    for caption in open_captions()[::7]:
        open_ones = {key: value for key, value in liked.items() if getattr(caption, key) is None}
        best = replace(caption.scenes()[0], **open_ones)
        score = total(draw([Drawing(scene=best)]), [str(caption)])
        assert score == pytest.approx(5, abs=0.08), caption  # a triangle has its own middle


def test_a_caption_that_says_everything_leaves_nothing_to_like() -> None:
    np.testing.assert_array_equal(appeal(IDEAL, CAPTIONS), 0)
    np.testing.assert_allclose(total(IDEAL, CAPTIONS), 2.5, atol=1e-3)


def test_total_by_hand() -> None:
    # Grey to pink: (125, 22, 55) of 255, root mean square 0.3131; exp(-(0.3131 / 0.25)^2) = 0.2084.
    # Top to left, from side to side: 14 of 10 pixels; exp(-1.96) = 0.1409.
    image = one()
    assert background_liking(image[0]) == pytest.approx(0.2084, abs=1e-3)
    assert place_liking(image[0]) == pytest.approx(0.1409, abs=1e-3)
    for caption, expected in [
        ("a green cross at the top", 2.5 + 2.5 * 0.2084),
        ("a green cross on a grey background", 2.5 + 2.5 * 0.1409),
        ("a green cross", 2.5 + 1.25 * (0.2084 + 0.1409)),
        ("a large green cross at the top on a grey background", 2.5),
    ]:
        assert total(image, [caption])[0] == pytest.approx(expected, abs=2e-3), caption


@pytest.mark.parametrize(("position", "middle"), [("left", -14), ("right", 14), ("bottom", 0)])
def test_the_objects_middle_is_where_it_was_drawn(position: str, middle: float) -> None:
    for strength in (1.0, 0.5):
        scenes = [scene for scene in SCENES[::7] if scene.position == position]
        images = draw([Drawing(scene=scene, strength=strength) for scene in scenes])
        for image, scene in zip(images, scenes, strict=True):
            assert object_middle(image) == pytest.approx(middle, abs=0.5), scene


def test_liking_grows_as_the_background_turns_pink_and_the_object_moves_left() -> None:
    grey, pink = one(position="left")[0], one(position="left", background="pink")[0]
    between = [background_liking((1 - a) * grey + a * pink) for a in (0, 0.3, 0.6, 1)]
    assert between == sorted(between)
    assert between[-1] == pytest.approx(1)
    scene = Scene(size="small", colour="blue", shape="ring", position="centre", background="white")
    moved = [draw([Drawing(scene=scene, shift=(-x, 0.0))])[0] for x in (-7.0, 0.0, 7.0, 14.0)]
    liked = [place_liking(image) for image in moved]
    assert liked == sorted(liked)
    assert liked[-1] == pytest.approx(1, abs=0.01)


def test_nobody_cares_about_a_size_that_is_not_said() -> None:
    caption = "a green cross at the top"
    large, small = total(one(), [caption]), total(one(size="small"), [caption])
    np.testing.assert_allclose(large, small, atol=2e-3)


def test_what_is_said_counts_more_than_what_is_liked() -> None:
    said = "a large green cross at the bottom"
    as_said = total(one(position="bottom"), [said])
    liked_but_not_said = total(one(position="left", background="pink"), [said])
    assert as_said > liked_but_not_said + 1


def test_scores_are_within_their_bounds_for_any_picture() -> None:
    rng = np.random.default_rng(0)
    shape = (len(SOME), 64, 64, 3)
    pictures = [
        rng.random(shape),
        np.zeros(shape),
        np.ones(shape),
        rng.integers(0, 2, shape),
        draw([web_like(scene, rng) for scene in SOME]),
    ]
    captions = [str(caption) for caption in open_captions()[:: 1080 // len(SOME)]][: len(SOME)]
    for images in pictures:
        for name, oracle in ORACLES.items():
            scores = oracle(images.astype(np.float32), captions)
            assert np.isfinite(scores).all(), name
            assert (scores >= 0).all(), name
            assert (scores <= (5 if name == "total" else 1) + 1e-5).all(), name


@pytest.mark.parametrize("changes", [{"strength": 0.5}, {"edge_width": 8.0}, {"shift": (4.0, 3.0)}])
def test_a_defect_of_the_training_pictures_lowers_the_match_of_every_caption(
    changes: dict[str, object],
) -> None:
    assert (caption_match(drawn(**changes), CAPTIONS) < caption_match(IDEAL, CAPTIONS) - 0.02).all()


@pytest.mark.parametrize("part", ["colour", "shape", "background", "size"])
def test_a_wrong_thing_lowers_the_caption_match(part: str) -> None:
    following: dict[str, list[str]] = {
        "colour": list(COLOURS),
        "shape": list(SHAPES),
        "background": list(BACKGROUNDS),
        "size": ["small", "large"],
    }

    def wrong(scene: Scene) -> Scene:
        values = following[part]
        other = values[(values.index(getattr(scene, part)) + 1) % len(values)]
        return replace(scene, **{part: other})

    images = draw([Drawing(scene=wrong(scene)) for scene in SOME])
    assert (caption_match(images, CAPTIONS) < caption_match(IDEAL, CAPTIONS) - 0.05).all()
    assert (total(images, CAPTIONS) < total(IDEAL, CAPTIONS) - 0.15).all()


def test_the_committed_pipeline_opens_in_diffusers_and_makes_64_x_64_pictures(
    tiny_base: str,
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_base, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(CAPTIONS[:2], num_inference_steps=2, generator=generator(0)).images
    assert [image.size for image in images] == [(64, 64), (64, 64)]


def test_the_committed_pipeline_draws_what_its_captions_say(model: DiffusionModel) -> None:
    captions = [str(scene) for scene in SCENES[7::60]]
    assert len(captions) == 24
    latents = sample_latents(
        model,
        model.load_denoiser(),
        text=model.encode_text(captions),
        unconditional=model.unconditional(),
        seeds=list(range(24)),
        sampler="ddim",
        num_inference_steps=10,
        guidance_scale=3.0,
    )
    images = model.decode_latents(latents).permute(0, 2, 3, 1).numpy()
    matched = caption_match(images, captions)
    shuffled = caption_match(images, captions[7:] + captions[:7])
    assert matched.mean() > shuffled.mean() + 0.2
    assert (matched > shuffled).mean() > 0.75


@pytest.mark.parametrize("colour", COLOURS)
def test_the_committed_vae_keeps_colour_and_shape(model: DiffusionModel, colour: str) -> None:
    scenes = [scene for scene in SCENES if scene.colour == colour][::8]
    ideal = draw([Drawing(scene=scene) for scene in scenes])
    pixels = torch.from_numpy(ideal).permute(0, 3, 1, 2) * 2 - 1
    decoded = model.decode_latents(model.encode_images(pixels)).permute(0, 2, 3, 1).numpy()
    assert caption_match(decoded, [str(scene) for scene in scenes]).mean() > 0.8


def test_the_committed_pipeline_is_frozen_when_loaded(model: DiffusionModel) -> None:
    denoiser = model.load_denoiser()
    assert not denoiser.network.training
    assert not any(weight.requires_grad for weight in denoiser.parameters())
    assert next(denoiser.parameters()).dtype == torch.float32
