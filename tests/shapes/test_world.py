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
from stages.shapes.captions import COLOURS, SHAPES, Scene, all_scenes, parse_caption
from stages.shapes.oracle import ORACLES, caption_match, crispness, total, vividness
from stages.shapes.renderer import Drawing, draw, web_like

SCENES = all_scenes()
SOME = SCENES[::29]
CAPTIONS = [str(scene) for scene in SOME]
IDEAL = draw([Drawing(scene=scene) for scene in SOME])


def drawn(**changes: object) -> np.ndarray:
    return draw([Drawing(scene=scene, **changes) for scene in SOME])  # type: ignore[arg-type]


def test_all_1440_captions_differ_and_give_back_their_scene() -> None:
    captions = [str(scene) for scene in SCENES]
    assert len(set(captions)) == len(captions) == 1440
    assert [parse_caption(caption) for caption in captions] == SCENES


def test_a_hand_written_caption_is_its_scene() -> None:
    scene = Scene(size="small", colour="red", shape="ring", position="top", background="pink")
    assert str(scene) == "a small red ring at the top on a pink background"
    assert parse_caption(f"  {scene} \n") == scene


def test_other_text_is_no_caption() -> None:
    with pytest.raises(ValueError, match="'a red hat' is not a caption"):
        parse_caption("a red hat")


def test_the_ideal_picture_of_every_caption_scores_5() -> None:
    ideal = draw([Drawing(scene=scene) for scene in SCENES])
    captions = [str(scene) for scene in SCENES]
    np.testing.assert_allclose(total(ideal, captions), 5.0, atol=1e-3)


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
    for images in pictures:
        for name, oracle in ORACLES.items():
            scores = oracle(images.astype(np.float32), CAPTIONS)
            assert np.isfinite(scores).all(), name
            assert (scores >= 0).all(), name
            assert (scores <= (5 if name == "total" else 1) + 1e-5).all(), name


def test_total_is_three_times_the_match_and_once_the_others() -> None:
    images = drawn(strength=0.6, edge_width=5.0)
    parts = 3 * caption_match(images, CAPTIONS)
    parts = parts + vividness(images, CAPTIONS) + crispness(images, CAPTIONS)
    np.testing.assert_allclose(total(images, CAPTIONS), parts, rtol=1e-6)


def test_fading_lowers_vividness_of_every_caption_and_leaves_crispness() -> None:
    levels = [vividness(drawn(strength=strength), CAPTIONS) for strength in (1.0, 0.7, 0.4)]
    assert (levels[0] > levels[1] + 0.1).all()
    assert (levels[1] > levels[2] + 0.1).all()
    crisp = crispness(drawn(strength=0.7), CAPTIONS)
    np.testing.assert_allclose(crisp, crispness(IDEAL, CAPTIONS), atol=0.05)


def test_blur_lowers_crispness_of_every_caption_step_by_step() -> None:
    levels = [crispness(drawn(edge_width=width), CAPTIONS) for width in (1.0, 4.0, 8.0)]
    assert (levels[0] > levels[1] + 0.05).all()
    assert (levels[1] > levels[2] + 0.05).all()


def test_a_shift_lowers_the_caption_match_and_nothing_else() -> None:
    moved = drawn(shift=(4.0, 3.0))
    assert (caption_match(moved, CAPTIONS) < caption_match(IDEAL, CAPTIONS) - 0.1).all()
    assert (vividness(moved, CAPTIONS) > 0.95).all()
    assert (crispness(moved, CAPTIONS) > 0.9).all()


@pytest.mark.parametrize("part", ["colour", "shape", "background", "size"])
def test_a_wrong_thing_lowers_the_caption_match(part: str) -> None:
    following: dict[str, list[str]] = {
        "colour": list(COLOURS),
        "shape": list(SHAPES),
        "background": ["black", "white", "grey", "pink"],
        "size": ["small", "large"],
    }

    def wrong(scene: Scene) -> Scene:
        values = following[part]
        other = values[(values.index(getattr(scene, part)) + 1) % len(values)]
        return replace(scene, **{part: other})

    images = draw([Drawing(scene=wrong(scene)) for scene in SOME])
    assert (caption_match(images, CAPTIONS) < caption_match(IDEAL, CAPTIONS) - 0.05).all()
    assert (total(images, CAPTIONS) < total(IDEAL, CAPTIONS) - 0.15).all()


def test_over_saturation_earns_nothing() -> None:
    loud = np.clip(drawn(strength=1.6), 0, 1).astype(np.float32)
    assert (vividness(loud, CAPTIONS) <= 1).all()
    assert (total(loud, CAPTIONS) <= total(IDEAL, CAPTIONS) + 1e-4).all()


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
