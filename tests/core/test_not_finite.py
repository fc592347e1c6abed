"""Numbers that are not finite stop where they arise, and the message names the cause."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from stages.core.errors import UserError
from stages.core.method.sampling import sample_latents
from stages.core.models.adapter import DiffusionModel
from stages.core.models.families import load_model
from stages.core.models.loading import ModelError
from stages.core.policies.encoding import latents_tensor
from stages.core.preflight.findings import Findings
from stages.core.preflight.invariants import check_vae
from tests import tiny_models
from tests.builders import settings

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = {"sd15": tiny_models.sd15, "sdxl": tiny_models.sdxl}[request.param]
    return build(tmp_path_factory.mktemp(request.param))


def overflowing(base: Path, part: str) -> DiffusionModel:
    """The model in float16 with a VAE whose last layer of one half makes numbers above 65504."""
    model = load_model(settings(base, "float16"), device=CPU)
    vae = model._vae().half()  # type: ignore[attr-defined]
    with torch.no_grad():
        half = {"encoder": vae.quant_conv, "decoder": vae.decoder.conv_out}[part]
        half.weight.fill_(6e4)
    return model


def picture(model: DiffusionModel) -> torch.Tensor:
    height, width = model.image_size
    return torch.linspace(-1, 1, width).expand(1, 3, height, -1)


def test_a_vae_that_overflows_is_named_when_it_encodes(base: Path) -> None:
    model = overflowing(base, "encoder")
    with pytest.raises(ModelError, match=r"VAE's latents .* not finite in float16.*fp16-fix"):
        model.encode_images(picture(model))


def test_a_vae_that_overflows_is_named_when_it_decodes(base: Path) -> None:
    model = overflowing(base, "decoder")
    with pytest.raises(ModelError, match=r"images that the VAE decodes .* in float16.*model\.vae"):
        model.decode_latents(torch.randn(1, *model.latents_shape))


def test_preflight_sends_a_picture_through_the_vae(base: Path) -> None:
    sound, broken = Findings(), Findings()
    check_vae(load_model(settings(base), device=CPU), sound)
    check_vae(overflowing(base, "decoder"), broken)
    assert (sound.failed, broken.failed) == ([], ["a picture through the VAE"])
    assert "not finite in float16" in broken.checks[0][1]


def test_a_policy_that_has_diverged_is_named_by_the_sampler(base: Path) -> None:
    model = load_model(settings(base), device=CPU)
    denoiser = model.load_denoiser()
    with torch.no_grad():
        next(iter(denoiser.parameters())).fill_(float("inf"))
    with pytest.raises(ModelError, match=r"sampler's latents are not finite.*has diverged"):
        sample_latents(
            model, denoiser, text=model.encode_text(["a cat"]), unconditional=model.unconditional(),
            seeds=[1], sampler="ddim", num_inference_steps=2, guidance_scale=2.0,
        )  # fmt: skip


def test_a_text_encoder_that_overflows_is_named(base: Path) -> None:
    model = load_model(settings(base), device=CPU)
    model.encode_text(["a cat"])
    with torch.no_grad():
        for weight in model._parts["text_encoder"].parameters():
            weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="text encoders?'s? states are not finite"):
        model.encode_text(["a cat"])


def test_stored_latents_are_looked_at(base: Path) -> None:
    latents = [[0.0, 1.0], [float("nan"), float("inf")]]
    column = pa.chunked_array([pa.array(latents, pa.list_(pa.float32()))])
    with pytest.raises(UserError, match=r"^here: 2 values of the latents are not finite"):
        latents_tensor(column, (1, 1, 2), "here")


def test_noise_prediction_on_a_schedule_that_ends_in_pure_noise_is_refused(base: Path) -> None:
    path = base / "scheduler" / "scheduler_config.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "rescale_betas_zero_snr": True}))
    try:
        with pytest.raises(ModelError, match=r"rescale_betas_zero_snr.*prediction_type epsilon"):
            load_model(settings(base), device=CPU)
        path.write_text(json.dumps(
            {**whole, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}))  # fmt: skip
        assert load_model(settings(base), device=CPU).num_timesteps == 1000
    finally:
        path.write_text(json.dumps(whole))
