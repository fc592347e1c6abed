"""Sampling against diffusers' own pipeline, and its independence of batches."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from torch import Tensor

from stages.core.method.noising import generator
from stages.core.method.sampling import sample_latents
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import Denoiser
from stages.core.models.loading import ModelError
from tests.builders import CAPTIONS

PROMPTS = CAPTIONS[:3]
SEEDS = [11, 12, 13]
SCHEDULERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}


@dataclass(frozen=True)
class Case:
    """How to sample."""

    sampler: str
    guidance_scale: float


CASES = [Case("ddim", 3.0), Case("ddim", 1.0), Case("ddpm", 3.0), Case("ddpm", 1.0)]


def ours(model: DiffusionModel, denoiser: Denoiser, case: Case, rows: list[int]) -> Tensor:
    return sample_latents(
        model,
        denoiser,
        text=model.encode_text([PROMPTS[row] for row in rows]),
        unconditional=model.unconditional(),
        seeds=[SEEDS[row] for row in rows],
        sampler=case.sampler,
        num_inference_steps=3,
        guidance_scale=case.guidance_scale,
    )


@pytest.fixture(scope="module")
def pipeline(tiny_base: str) -> StableDiffusionPipeline:
    """The committed pipeline as diffusers itself loads it."""
    loaded = StableDiffusionPipeline.from_pretrained(tiny_base, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.mark.parametrize("case", CASES, ids=str)
def test_latents_equal_those_of_diffusers_pipeline(
    model: DiffusionModel, base_denoiser: Denoiser, pipeline: StableDiffusionPipeline, case: Case
) -> None:
    pipeline.scheduler = SCHEDULERS[case.sampler].from_config(pipeline.scheduler.config)
    expected = pipeline(
        PROMPTS,
        num_inference_steps=3,
        guidance_scale=case.guidance_scale,
        generator=[generator(seed) for seed in SEEDS],
        output_type="latent",
    ).images
    found = ours(model, base_denoiser, case, [0, 1, 2])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_decoded_images_equal_those_of_diffusers_pipeline(
    model: DiffusionModel, base_denoiser: Denoiser, pipeline: StableDiffusionPipeline
) -> None:
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    expected = pipeline(
        PROMPTS[:1],
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=generator(11),
        output_type="pt",
    ).images
    found = model.decode_latents(ours(model, base_denoiser, CASES[0], [0]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
def test_an_image_alone_equals_the_same_image_in_any_batch(
    model: DiffusionModel, base_denoiser: Denoiser, case: Case
) -> None:
    together = ours(model, base_denoiser, case, [0, 1, 2])
    for rows in ([0], [1], [2, 0]):
        found = ours(model, base_denoiser, case, rows)
        torch.testing.assert_close(found, together[rows], atol=1e-4, rtol=0)


def test_seed_prompt_and_guidance_each_change_the_image(
    model: DiffusionModel, base_denoiser: Denoiser
) -> None:
    images = ours(model, base_denoiser, CASES[0], [0, 1])
    unguided = ours(model, base_denoiser, CASES[1], [0])
    assert (images[0] - images[1]).abs().max() > 0.1
    assert (images[0] - unguided[0]).abs().max() > 0.01


def test_an_unknown_sampler_is_refused_with_the_known_ones(model: DiffusionModel) -> None:
    with pytest.raises(
        ModelError, match="sampler is 'euler'; models of stable-diffusion have ddpm, ddim"
    ):
        model.sampler("euler")
