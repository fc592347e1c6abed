"""Random models of the real architectures and file layouts, small enough for two cores.

Same classes, block types and conditioning as Stable Diffusion 1.5 and SDXL 1.0; only the numbers of
channels, layers and words are small. Nothing about them is trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

SD15_SCHEDULER: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SDXL_SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
"""As published in the models' own scheduler/scheduler_config.json."""

SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
}
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""As published in the models' own unet/config.json."""


def tokenizer(folder: Path, pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """A CLIP tokenizer of single characters: every text can be written with it."""
    folder.mkdir(parents=True, exist_ok=True)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [chr(256 + i) for i in range(256 - len(printable))]
    letters = [*map(chr, printable), *shifted]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    words.append("!") if "!" not in words else None
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        pad_token=pad_token,
        model_max_length=77,
    )


def text_config(words: int, width: int, projection: int) -> CLIPTextConfig:
    """A CLIP text encoder of two layers."""
    return CLIPTextConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=projection,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=words - 1,
    )


def vae(scaling_factor: float, *, force_upcast: bool) -> AutoencoderKL:
    """The SD VAE's four levels: one latent pixel for 8 x 8 pixels, 4 channels."""
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=scaling_factor,
        force_upcast=force_upcast,
    )


def sd15(folder: Path, *, seed: int = 0, prediction_type: str = "epsilon") -> Path:
    """A Stable Diffusion 1.5 in diffusers' layout: 64 x 64 pixels, latents 4 x 8 x 8."""
    torch.manual_seed(seed)
    words = tokenizer(folder / "words")
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    StableDiffusionPipeline(
        vae=vae(0.18215, force_upcast=False),
        text_encoder=CLIPTextModel(text_config(len(words), 24, 24)),
        tokenizer=words,
        unet=unet,
        scheduler=PNDMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "model", safe_serialization=True)
    is_other = prediction_type != "epsilon"  # the published file does not name epsilon
    return with_scheduler(
        folder / "model",
        {**SD15_SCHEDULER, **({"prediction_type": prediction_type} if is_other else {})},
    )


def middle_size_sd15(folder: Path) -> Path:
    """As `sd15` with 28 million weights in its UNet and latents of 4 x 16 x 16."""
    base = sd15(folder)
    torch.manual_seed(0)
    config = UNet2DConditionModel.load_config(base / "unet")
    wide = {"sample_size": 16, "block_out_channels": (64, 128, 256, 256), "norm_num_groups": 32}
    UNet2DConditionModel.from_config({**config, **wide}).save_pretrained(base / "unet")
    return base


def sdxl(folder: Path, *, seed: int = 0) -> Path:
    """An SDXL 1.0 in diffusers' layout: 64 x 64 pixels, latents 4 x 8 x 8."""
    torch.manual_seed(seed)
    words, words_2 = tokenizer(folder / "words"), tokenizer(folder / "words_2", pad_token="!")
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=16 + 24,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 20,
        norm_num_groups=8,
    )
    StableDiffusionXLPipeline(
        vae=vae(0.13025, force_upcast=True),
        text_encoder=CLIPTextModel(text_config(len(words), 16, 16)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(len(words_2), 24, 20)),
        tokenizer=words,
        tokenizer_2=words_2,
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    ).save_pretrained(folder / "model", safe_serialization=True)
    return with_scheduler(folder / "model", SDXL_SCHEDULER)


def with_scheduler(base: Path, config: dict[str, Any]) -> Path:
    """The model in this folder with another scheduler's config, written as it is."""
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return base


PUBLISHED_VAE: dict[str, Any] = {
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
"""As in the models' own vae/config.json, save for the scaling factor."""
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
CLIP_BIG_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
"""As in the models' own text_encoder/config.json and text_encoder_2/config.json, save for the words."""


def real_sd15(folder: Path) -> Path:
    """Stable Diffusion 1.5 at its published size with random weights; only the words are few."""
    base = sd15(folder)
    with on_the_device():
        UNet2DConditionModel(**SD15_UNET).save_pretrained(base / "unet")
        AutoencoderKL(**PUBLISHED_VAE, scaling_factor=0.18215).save_pretrained(base / "vae")
        published_text(CLIPTextModel, CLIP_L, base, "")
    return base


def real_sdxl(folder: Path) -> Path:
    """SDXL 1.0 at its published size with random weights; only the words are few."""
    base = sdxl(folder)
    with on_the_device():
        UNet2DConditionModel(**SDXL_UNET).save_pretrained(base / "unet")
        larger = {**PUBLISHED_VAE, "sample_size": 1024, "force_upcast": True}
        AutoencoderKL(**larger, scaling_factor=0.13025).save_pretrained(base / "vae")
        published_text(CLIPTextModel, CLIP_L, base, "")
        published_text(CLIPTextModelWithProjection, CLIP_BIG_G, base, "_2")
    return base


def published_text(kind: Any, numbers: dict[str, Any], base: Path, suffix: str) -> None:
    """Put a CLIP of the published size in the place of a small one, whose words it keeps."""
    words = len(CLIPTokenizer.from_pretrained(base / f"tokenizer{suffix}"))
    small = text_config(words, 24, 24).to_dict()
    kind(CLIPTextConfig(**{**small, **numbers})).save_pretrained(base / f"text_encoder{suffix}")


def on_the_device() -> torch.device:
    """Billions of random numbers are drawn in seconds on a GPU, in minutes on a CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
