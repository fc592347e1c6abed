"""The Stable Diffusion adapter: sizes, round trips, and folders it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stages.core.artifacts.images import to_model_input
from stages.core.method.noising import generator
from stages.core.models.adapter import DiffusionModel
from stages.core.models.families import load_model
from stages.core.models.loading import ModelError
from stages.core.models.policy import Policy
from stages.core.policies.loading import load_denoiser
from tests.builders import CAPTIONS, picture, settings

CPU = torch.device("cpu")


@pytest.fixture
def copy(tiny_base: str, tmp_path: Path) -> Path:
    """A copy of the committed pipeline that a test may damage."""
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_sizes_are_those_of_the_committed_pipeline(model: DiffusionModel) -> None:
    assert model.latents_shape == (8, 8, 8)
    assert model.image_size == (64, 64)
    assert model.num_timesteps == 1000


def test_decoding_what_was_encoded_gives_nearly_the_picture(model: DiffusionModel) -> None:
    pixels = np.stack([picture(caption) for caption in CAPTIONS[:4]])
    inputs = torch.from_numpy(to_model_input([Image.fromarray(p) for p in pixels], 64))
    latents = model.encode_images(inputs)
    assert latents.shape == (4, 8, 8, 8)
    assert 0.3 < latents.std().item() < 3  # the scaling factor makes them about 1
    decoded = model.decode_latents(latents)
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    assert (decoded - expected).abs().mean().item() < 0.05
    torch.testing.assert_close(model.encode_images(inputs[:1]), latents[:1], atol=1e-5, rtol=1e-5)


def test_noising_keeps_signal_and_noise_in_the_schedules_parts(model: DiffusionModel) -> None:
    latents, noise = torch.randn((2, 3, 8, 8, 8), generator=generator(0)).unbind(0)
    steps = torch.tensor([0, 500, 999])
    share = model.sampler("ddpm").alphas_cumprod[steps][:, None, None, None]
    expected = share.sqrt() * latents + (1 - share).sqrt() * noise
    torch.testing.assert_close(model.add_noise(latents, noise, steps), expected)


def test_a_long_prompt_is_cut_and_does_not_fail(model: DiffusionModel) -> None:
    prompts = ["a red circle " * 200, ""]
    assert len(model.encode_text(prompts)) == 2
    assert model.num_truncated(prompts) == 1


def test_a_finished_policy_is_what_was_saved(model: DiffusionModel, other_policy: Path) -> None:
    base, other = load_denoiser(model, "base"), load_denoiser(model, str(other_policy))
    assert not other.network.training
    assert not any(weight.requires_grad for weight in other.parameters())
    ours, theirs = base.state_dict(), other.state_dict()
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_policy_of_another_base_is_refused(
    model: DiffusionModel, other_policy: Path, copy: Path
) -> None:
    edit(copy / "unet" / "config.json", cross_attention_dim=32)
    with pytest.raises(ModelError, match="cross_attention_dim = 64.*has 32.*another base model"):
        load_model(settings(copy), device=CPU).load_denoiser(Policy(other_policy))


def test_a_folder_without_a_part_is_named_with_what_it_holds(copy: Path) -> None:
    shutil.rmtree(copy / "unet")
    with pytest.raises(
        ModelError, match="no folder 'unet' .found: model_index.json, scheduler"
    ) as e:
        load_model(settings(copy), device=CPU).load_denoiser()
    assert str(copy) in str(e.value)


def test_damaged_weights_are_named(copy: Path) -> None:
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="unet could not be loaded as UNet2DConditionModel"):
        load_model(settings(copy), device=CPU).load_denoiser()


def test_a_model_that_predicts_something_else_is_refused(copy: Path) -> None:
    edit(copy / "scheduler" / "scheduler_config.json", prediction_type="sample")
    with pytest.raises(ModelError, match="'sample'; supported are epsilon, v_prediction"):
        load_model(settings(copy), device=CPU)
