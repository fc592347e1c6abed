"""Where models come from: single files, other VAEs, and everything that is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from stages.core.method.noising import generator
from stages.core.models.families import load_model
from stages.core.models.loading import ModelError
from tests import single_file, tiny_models
from tests.builders import FULL, settings

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of each family."""
    build = {"sd15": tiny_models.sd15, "sdxl": tiny_models.sdxl}[request.param]
    return build(tmp_path_factory.mktemp(request.param))


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(base, tmp_path / "copy"))


def test_a_single_file_checkpoint_is_the_same_model(base: Path, tmp_path: Path) -> None:
    kind = StableDiffusionXLPipeline if "sdxl" in str(base) else StableDiffusionPipeline
    path = single_file.write(kind.from_pretrained(base), tmp_path / "model.safetensors")
    folder = load_model(settings(base), device=CPU)
    single = load_model(settings(path, config=str(base)), device=CPU)
    assert type(single) is type(folder)
    assert single.latents_shape == folder.latents_shape
    assert single.image_size == folder.image_size
    texts = [model.encode_text(["a cat", ""]) for model in (folder, single)]
    for name, value in texts[0].tensors.items():
        torch.testing.assert_close(texts[1][name], value, atol=1e-5, rtol=1e-5)
    latents = torch.randn((2, *folder.latents_shape), generator=generator(0))
    steps = torch.tensor([10, 900])
    torch.testing.assert_close(
        *(m.predict(m.load_denoiser(), latents, steps, t) for m, t in zip((folder, single), texts, strict=True)),
        atol=1e-5, rtol=1e-5,
    )  # fmt: skip
    torch.testing.assert_close(
        *(m.decode_latents(latents) for m in (folder, single)), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_single_files_policy_and_reference_are_two_networks(
    base: Path, tmp_path: Path, dtype: str
) -> None:
    kind = StableDiffusionXLPipeline if "sdxl" in str(base) else StableDiffusionPipeline
    path = single_file.write(kind.from_pretrained(base), tmp_path / "model.safetensors")
    model = load_model(settings(path, dtype, config=str(base)), device=CPU)
    policy, reference = model.load_for_training(None, None, FULL, seed=0)
    assert policy.network is not reference.network
    fresh = load_model(settings(base), device=CPU).load_denoiser().state_dict()
    for name, value in policy.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, fresh[name])
    next(policy.parameters()).data.add_(1.0)
    assert not torch.equal(next(policy.parameters()), next(reference.parameters()).float())


def test_another_vae_takes_the_place_of_the_models_own(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(9)
    tiny_models.vae(0.5, force_upcast=False).save_pretrained(tmp_path / "vae")
    plain = load_model(settings(base), device=CPU)
    other = load_model(settings(base, vae=str(tmp_path / "vae")), device=CPU)
    latents = torch.randn((1, *plain.latents_shape), generator=generator(0))
    expected = AutoencoderKL.from_pretrained(tmp_path / "vae").decode(latents / 0.5).sample
    torch.testing.assert_close(
        other.decode_latents(latents), (expected.detach() / 2 + 0.5).clamp(0, 1)
    )
    assert not torch.equal(plain.decode_latents(latents), other.decode_latents(latents))


def test_sdxls_vae_runs_in_float32_when_the_model_is_float16(base: Path, tmp_path: Path) -> None:
    model = load_model(settings(base, "float16"), device=CPU)
    images = model.decode_latents(torch.zeros((1, *model.latents_shape)))
    assert images.dtype == torch.float32
    dtype = next(model._load("vae", AutoencoderKL).parameters()).dtype
    assert dtype == (torch.float32 if "sdxl" in str(base) else torch.float16)


@pytest.mark.parametrize(
    ("config", "count", "keys"),
    [
        (tiny_models.SD15_UNET, 859_520_964, 686),
        (tiny_models.SDXL_UNET, 2_567_463_684, 1680),
    ],
    ids=["sd15", "sdxl"],
)
def test_the_published_configurations_give_the_published_networks(
    config: dict[str, Any], count: int, keys: int
) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    assert sum(parameter.numel() for parameter in unet.parameters()) == count
    state = unet.state_dict()
    assert len(state) == keys
    channels = config["block_out_channels"]
    assert state["conv_in.weight"].shape == (channels[0], 4, 3, 3)
    last = len(channels) - 1
    width = config["cross_attention_dim"]
    attention = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert state[attention].shape == (channels[last], width)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_a_pickle_is_refused_before_it_is_opened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"not read")
    with pytest.raises(ModelError, match="is a pickle, which can run code"):
        load_model(settings(path), device=CPU)


def test_a_folder_with_pickled_weights_is_refused(copy: Path) -> None:
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(safetensors.torch.load_file(weights), copy / "unet" / "diffusion_pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match=r"unet.*holds diffusion_pytorch_model.bin, a pickle"):
        load_model(settings(copy), device=CPU).load_denoiser()


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist; model.base must be a folder"):
        load_model(settings(tmp_path / "none"), device=CPU)


def test_a_folder_that_is_no_model_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match=r"no model_index.json \(found: notes.txt\)"):
        load_model(settings(tmp_path), device=CPU)


def test_a_family_without_an_adapter_is_named(copy: Path) -> None:
    index = copy / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionXLPipeline", "FluxPipeline").replace(
        "StableDiffusionPipeline", "FluxPipeline"))  # fmt: skip
    with pytest.raises(
        ModelError, match="is a FluxPipeline; supported are StableDiffusionPipeline"
    ):
        load_model(settings(copy), device=CPU)


def test_a_missing_component_is_named(copy: Path) -> None:
    shutil.rmtree(copy / "text_encoder")
    with pytest.raises(ModelError, match="no folder 'text_encoder'"):
        load_model(settings(copy), device=CPU).encode_text(["a"])


def test_a_tokenizer_of_another_model_is_refused(copy: Path, tiny_base: str) -> None:
    shutil.rmtree(copy / "text_encoder")
    shutil.copytree(Path(tiny_base) / "text_encoder", copy / "text_encoder")
    with pytest.raises(ModelError, match="they belong to different models"):
        load_model(settings(copy), device=CPU).encode_text(["a"])


def test_a_lora_or_another_file_is_no_base_model(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    safetensors.torch.save_file({"unet.down.lora_A.weight": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="no whole checkpoint.*unet.down.lora_A"):
        load_model(settings(path), device=CPU)
    path.write_bytes(b"damaged")
    with pytest.raises(ModelError, match="no readable safetensors file"):
        load_model(settings(path), device=CPU)
