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
from stages.core.models.original_layout import vae_weights
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


@pytest.mark.quick("sdxl")
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
        *(
            m.predict(m.load_denoiser(), latents, steps, t)
            for m, t in zip((folder, single), texts, strict=True)
        ),
        atol=1e-5,
        rtol=1e-5,
    )
    torch.testing.assert_close(
        *(m.decode_latents(latents) for m in (folder, single)), atol=1e-5, rtol=0
    )


@pytest.mark.quick("sdxl-bfloat16")
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
    index.write_text(
        index.read_text()
        .replace("StableDiffusionXLPipeline", "KolorsPipeline")
        .replace("StableDiffusionPipeline", "KolorsPipeline")
    )
    with pytest.raises(
        ModelError, match="is a KolorsPipeline; supported are StableDiffusionPipeline"
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


@pytest.mark.parametrize("variant", ["fp16", "non_ema"])
def test_weights_of_one_variant_alone_are_read(copy: Path, variant: str) -> None:
    expected = dict(load_model(settings(copy), device=CPU).load_denoiser().named_weights())
    for part in ("unet", "vae", "text_encoder"):
        for path in (copy / part).glob("*.safetensors"):
            path.rename(path.with_name(f"{path.stem}.{variant}.safetensors"))
    model = load_model(settings(copy), device=CPU)
    for name, weight in model.load_denoiser().named_weights():
        torch.testing.assert_close(weight, expected[name], atol=0, rtol=0)
    assert model.encode_text(["a cat"])["text"].isfinite().all()
    assert model.decode_latents(torch.zeros((1, *model.latents_shape))).isfinite().all()


@pytest.mark.parametrize("name", ["./models/sd15", "models/sd15", "~/sd15", "x/y.safetensors"])
def test_a_missing_path_is_no_hub_id(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(ModelError, match=f"{name} does not exist"):
        load_model(settings(name), device=CPU)


def test_a_vae_may_be_a_file_or_a_whole_models(base: Path, copy: Path, tmp_path: Path) -> None:
    vae = load_model(settings(base), device=CPU).source.read("vae", AutoencoderKL)
    with torch.no_grad():
        for weight in vae.parameters():
            weight.mul_(1.1)
    vae.save_pretrained(copy / "vae", safe_serialization=True)
    file = tmp_path / "vae.safetensors"
    plain = vae_weights(vae.state_dict())
    safetensors.torch.save_file({k: v.detach().contiguous() for k, v in plain.items()}, file)
    latents = torch.randn((1, 4, 8, 8), generator=generator(0))
    expected = load_model(settings(copy), device=CPU).decode_latents(latents)
    for other in (copy, copy / "vae", file):
        found = load_model(settings(base, vae=str(other)), device=CPU).decode_latents(latents)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    with pytest.raises(ModelError, match="model.vae /nowhere/vae does not exist"):
        load_model(settings(base, vae="/nowhere/vae"), device=CPU).decode_latents(latents)


def test_a_checkpoint_without_a_vae_takes_the_one_that_is_named(base: Path, tmp_path: Path) -> None:
    kind = StableDiffusionXLPipeline if "sdxl" in str(base) else StableDiffusionPipeline
    whole = single_file.write(kind.from_pretrained(base), tmp_path / "whole.safetensors")
    weights = safetensors.torch.load_file(whole)
    bare = tmp_path / "bare.safetensors"
    kept = {k: v for k, v in weights.items() if not k.startswith("first_stage_model.")}
    safetensors.torch.save_file(kept, bare)
    latents = torch.randn((1, 4, 8, 8), generator=generator(0))
    expected = load_model(settings(base), device=CPU).decode_latents(latents)
    named = settings(bare, config=str(base), vae=str(base / "vae"))
    found = load_model(named, device=CPU).decode_latents(latents)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    with pytest.raises(ModelError, match="needs model.vae"):
        load_model(settings(bare, config=str(base)), device=CPU)


@pytest.mark.quick("sd15-keys0-expected0", "sdxl-keys2-expected2")
@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ((), ("epsilon", False)),
        (("v_pred",), ("v_prediction", False)),
        (("v_pred", "ztsnr"), ("v_prediction", True)),
    ],
)
def test_keys_without_a_value_say_what_a_checkpoint_predicts(
    base: Path, tmp_path: Path, keys: tuple[str, ...], expected: tuple[str, bool]
) -> None:
    kind = StableDiffusionXLPipeline if "sdxl" in str(base) else StableDiffusionPipeline
    whole = single_file.write(kind.from_pretrained(base), tmp_path / "whole.safetensors")
    marked = safetensors.torch.load_file(whole) | {key: torch.zeros(0) for key in keys}
    safetensors.torch.save_file(marked, whole)
    config = load_model(settings(whole, config=str(base)), device=CPU).sampler("ddim").config
    assert (config.prediction_type, config.rescale_betas_zero_snr) == expected
    safetensors.torch.save_file(marked | {"edm_vpred.sigma_max": torch.zeros(1)}, whole)
    with pytest.raises(ModelError, match="EDM's schedule"):
        load_model(settings(whole, config=str(base)), device=CPU)
