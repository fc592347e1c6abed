"""The sampler is the base's own: as diffusers' pipeline has it, and what is no DDPM schedule is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from stages.core.method.noising import generator
from stages.core.method.sampling import sample_latents
from stages.core.models.families import load_model
from stages.core.models.loading import ModelError
from tests import tiny_models
from tests.builders import settings

CPU = torch.device("cpu")
PROMPTS = ["a cat in a hat", "an oil painting of a ship"]
KINDS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SILENT: dict[str, dict[str, Any]] = {
    "PNDM as published": tiny_models.SD15_SCHEDULER,
    "Euler as published": tiny_models.SDXL_SCHEDULER,
    "PNDM without clip_sample": {
        k: v for k, v in tiny_models.SD15_SCHEDULER.items() if k != "clip_sample"},
    "Euler without clip_sample": {
        k: v for k, v in tiny_models.SDXL_SCHEDULER.items() if k != "clip_sample"},
    "DDIM without clip_sample": {"_class_name": "DDIMScheduler", "steps_offset": 1, **BETAS},
    "DPM++, little said": {"_class_name": "DPMSolverMultistepScheduler", **BETAS},
    "UniPC, little said": {"_class_name": "UniPCMultistepScheduler", **BETAS},
    "Euler ancestral, little said": {"_class_name": "EulerAncestralDiscreteScheduler", **BETAS},
    "Euler, v and zero SNR": {
        "_class_name": "EulerDiscreteScheduler", **BETAS, "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}  # fmt: skip
"""Schedulers' files as community checkpoints have them."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {"sd15": tiny_models.sd15(folder / "sd15"), "sdxl": tiny_models.sdxl(folder / "sdxl")}


def copied(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder / "model")
    return folder / "model"


def change(base: Path, part: str, **values: Any) -> Path:
    """Overwrite keys of a part's config; None removes a key."""
    path = base / part / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))
    return base


@pytest.mark.quick(
    "PNDM as published-ddim",
    "Euler as published-ddpm",
    "Euler, v and zero SNR-ddim",
    "DPM++, little said-ddpm",
    "UniPC, little said-ddim",
    "Euler ancestral, little said-ddpm",
)
@pytest.mark.parametrize("sampler", KINDS)
@pytest.mark.parametrize("name", SILENT)
def test_latents_equal_those_of_the_pipeline_that_loads_the_same_folder(
    bases: dict[str, Path], tmp_path: Path, name: str, sampler: str
) -> None:
    family = "sdxl" if name.startswith("Euler") else "sd15"
    base = tiny_models.with_scheduler(copied(bases[family], tmp_path), SILENT[name])
    pipeline = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}[family]
    pipe = pipeline.from_pretrained(base, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    said = {"clip_sample": SILENT[name].get("clip_sample", False)}
    pipe.scheduler = KINDS[sampler].from_config(pipe.scheduler.config, **said)
    common = {"num_inference_steps": 4, "guidance_scale": 5.0}
    expected = pipe(
        PROMPTS, **common, generator=[generator(seed) for seed in (5, 6)], output_type="latent"
    ).images
    model = load_model(settings(base), device=CPU)
    found = sample_latents(
        model, model.load_denoiser(), text=model.encode_text(PROMPTS),
        unconditional=model.unconditional(), seeds=[5, 6], sampler=sampler, **common,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert float(found.abs().max()) > 1.0  # else clipping would not have shown


def test_clipping_is_kept_where_the_config_asks_for_it(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    said = {**tiny_models.SD15_SCHEDULER, "clip_sample": True}
    model = load_model(
        settings(tiny_models.with_scheduler(copied(bases["sd15"], tmp_path), said)), device=CPU
    )
    assert model.sampler("ddim").config.clip_sample is True


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_max": 80.0}, "is of EDMDPM"),
        ({"_class_name": "EDMEulerScheduler"}, "is of EDMEulerScheduler; expected"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "is of FlowMatchEuler"),
        ({"_class_name": "EulerDiscreteScheduler"}, "has no beta_start, beta_end"),
        ({"_class_name": "DDIMScheduler", "beta_start": 0.00085}, "has no beta_start, beta_end"),
        (
            {"_class_name": "UniPCMultistepScheduler", **BETAS, "use_flow_sigmas": True},
            "is of UniPCMultistepScheduler",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", **BETAS,
             "prediction_type": "flow_prediction"},
            "is of DPMSolverMultistepScheduler",
        ),
        ({"_class_name": "NoSuchScheduler", **BETAS}, "is of NoSuchScheduler"),
        (
            {"_class_name": "DDIMScheduler", **BETAS, "prediction_type": "sample"},
            "prediction_type 'sample'; supported are epsilon, v_prediction",
        ),
    ],
)  # fmt: skip
def test_what_is_no_ddpm_schedule_is_refused_by_name(
    bases: dict[str, Path], tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    base = tiny_models.with_scheduler(copied(bases["sdxl"], tmp_path), config)
    with pytest.raises(ModelError) as caught:
        load_model(settings(base), device=CPU)
    assert reason in str(caught.value)
    assert "scheduler_config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"in_channels": 9}, "in_channels 9 and out_channels 4: it is also given a mask"),
        ({"time_cond_proj_dim": 256}, "the guidance scale is embedded in this model"),
        ({"sample_size": None}, "sample_size None; expected one number"),
        ({"sample_size": [8, 8]}, "sample_size [8, 8]; expected one number"),
        ({"sample_size": "gone"}, "sample_size None; expected one number"),
    ],
)
def test_a_unet_that_no_formula_covers_is_refused(
    bases: dict[str, Path], tmp_path: Path, values: dict[str, Any], reason: str
) -> None:
    base = change(copied(bases["sd15"], tmp_path), "unet", **values)
    with pytest.raises(ModelError) as caught:
        load_model(settings(base), device=CPU)
    assert reason in str(caught.value)
    assert "unet/config.json" in str(caught.value)


def test_a_vaes_own_mean_and_deviation_are_taken_as_diffusers_does(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    mean, std = [0.1, -0.2, 0.3, 0.4], [1.5, 2.0, 0.5, 1.0]
    base = change(copied(bases["sdxl"], tmp_path), "vae", latents_mean=mean, latents_std=std)
    model = load_model(settings(base), device=CPU)
    latents = torch.randn((2, 4, 8, 8), generator=generator(1))
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae").eval()
    shape = (1, 4, 1, 1)
    scaled = latents * torch.tensor(std).view(shape) / vae.config.scaling_factor
    with torch.no_grad():  # as in StableDiffusionXLPipeline
        decoded = vae.decode(scaled + torch.tensor(mean).view(shape)).sample
    torch.testing.assert_close(model.decode_latents(latents), (decoded / 2 + 0.5).clamp(0, 1))
    images = torch.rand((1, 3, 64, 64), generator=generator(2)) * 2 - 1
    with torch.no_grad():
        mode = vae.encode(images).latent_dist.mode()
    expected = (mode - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    torch.testing.assert_close(model.encode_images(images), expected * vae.config.scaling_factor)
