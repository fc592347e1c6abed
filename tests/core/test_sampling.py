"""Sampling against diffusers' own pipeline, and its independence of batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
)
from torch import Tensor

from stages.core.method.guidance import guided_steps
from stages.core.method.noising import generator
from stages.core.method.sampling import sample_latents
from stages.core.models.adapter import DiffusionModel
from stages.core.models.denoiser import Denoiser
from stages.core.models.families import load_model
from stages.core.models.loading import ModelError
from tests.builders import CAPTIONS, settings
from tests.tiny_models import SD15_SCHEDULER, sd15, with_scheduler

PROMPTS = CAPTIONS[:3]
SEEDS = [11, 12, 13]
SCHEDULERS = {
    "ddim": DDIMScheduler, "ddpm": DDPMScheduler, "dpm": DPMSolverMultistepScheduler,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """How to sample."""

    sampler: str
    guidance_scale: float


CASES = [
    Case("ddim", 3.0), Case("ddim", 1.0), Case("ddpm", 3.0), Case("ddpm", 1.0), Case("dpm", 3.0),
]  # fmt: skip


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
        ModelError, match="sampler is 'euler'; models of stable-diffusion have ddpm, ddim, dpm"
    ):
        model.sampler("euler")


def test_guidance_in_an_interval_is_what_diffusers_does_when_it_is_switched_off(
    model: DiffusionModel, base_denoiser: Denoiser, pipeline: StableDiffusionPipeline
) -> None:
    def switch_off(pipe: Any, number: int, timestep: Any, kept: dict[str, Any]) -> dict[str, Any]:
        if number == 1:  # as diffusers' documentation of callbacks does it
            kept["prompt_embeds"] = kept["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return kept

    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    expected = pipeline(
        PROMPTS[:1], num_inference_steps=4, guidance_scale=3.0, generator=generator(11),
        output_type="latent", callback_on_step_end=switch_off,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    ).images  # fmt: skip
    how: dict[str, Any] = {
        "text": model.encode_text(PROMPTS[:1]), "unconditional": model.unconditional(), "seeds": [11],
        "sampler": "ddim", "num_inference_steps": 4,
    }  # fmt: skip

    def drawn(scale: float, *interval: float) -> Tensor:
        return sample_latents(
            model, base_denoiser, guidance_scale=scale, guidance_interval=interval, **how
        )

    torch.testing.assert_close(drawn(3.0, 0.0, 0.5), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(drawn(3.0, 0.0, 0.0), drawn(1.0, 0.0, 1.0))
    assert (drawn(3.0, 0.0, 1.0) - expected).abs().max() > 1e-3


def test_the_steps_of_an_interval_by_hand() -> None:
    assert guided_steps(10, (0.0, 1.0)) == range(10)
    assert guided_steps(10, (0.2, 0.8)) == range(2, 8)
    assert guided_steps(12, (0.0, 2 / 3)) == range(8)
    assert guided_steps(5, (0.5, 1.0)) == range(3, 5)
    assert not guided_steps(5, (0.5, 0.5))


def test_a_model_that_clips_has_no_dpm(tmp_path: Path) -> None:
    base = with_scheduler(sd15(tmp_path), SD15_SCHEDULER | {"clip_sample": True})
    model = load_model(settings(base), device=torch.device("cpu"))
    with pytest.raises(ModelError, match="sampler is 'dpm', which does not clip, .* use ddpm or d"):
        model.sampler("dpm")


@pytest.mark.parametrize("algorithm", ["sde-dpmsolver++", "dpmsolver++"])
def test_dpm_is_the_same_solver_whatever_a_models_own_config_names(
    tmp_path: Path, algorithm: str
) -> None:
    own = SD15_SCHEDULER | {
        "_class_name": "DPMSolverMultistepScheduler", "algorithm_type": algorithm, "solver_order": 3,
    }  # fmt: skip
    model = load_model(settings(with_scheduler(sd15(tmp_path), own)), device=torch.device("cpu"))
    found = model.sampler("dpm").config
    assert (found.algorithm_type, found.solver_order) == ("dpmsolver++", 2)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_more_steps_than_the_solver_has_room_for_are_refused(tmp_path: Path, spacing: str) -> None:
    own = SD15_SCHEDULER | {"timestep_spacing": spacing}
    model = load_model(settings(with_scheduler(sd15(tmp_path), own)), device=torch.device("cpu"))
    model.set_steps(model.sampler("dpm"), 15)
    for number in (999, 1000, 2000):
        with pytest.raises(ModelError, match=rf"is {number}, but the sampler dpm .* 1 to 998 on"):
            model.set_steps(model.sampler("dpm"), number)
