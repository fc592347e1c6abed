"""Random flow-matching models of the real architectures and file layouts, small enough for two cores.

Same classes, block types, text encoders and scheduler files as Stable Diffusion 3.5, FLUX.1 and Sana; only the
numbers of channels, layers and words are small. Nothing about them is trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests.tiny_models import (
    CLIP_BIG_G,
    CLIP_L,
    PUBLISHED_VAE,
    on_the_device,
    published_text,
    text_config,
    tokenizer,
    with_scheduler,
)

SD3_SCHEDULER: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.29.0.dev0",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}
FLUX_DEV_SCHEDULER: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.30.0.dev0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
FLUX_SCHNELL_SCHEDULER: dict[str, Any] = {
    **FLUX_DEV_SCHEDULER,
    "max_shift": 1.15,
    "shift": 1.0,
    "use_dynamic_shifting": False,
}
SANA_SCHEDULER: dict[str, Any] = {
    "_class_name": "DPMSolverMultistepScheduler",
    "_diffusers_version": "0.32.0.dev0",
    "algorithm_type": "dpmsolver++",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "flow_shift": 3.0,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "solver_type": "midpoint",
    "use_flow_sigmas": True,
}
"""As published in the models' own scheduler/scheduler_config.json (Sana's without what is at its default)."""

SD35_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
SD35_LARGE: dict[str, Any] = {
    **SD35_MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": (),
}
FLUX_DEV: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
SANA_1600M: dict[str, Any] = {
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 70,
    "attention_head_dim": 32,
    "num_layers": 20,
    "num_cross_attention_heads": 20,
    "cross_attention_head_dim": 112,
    "cross_attention_dim": 2240,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "sample_size": 32,
    "patch_size": 1,
}
"""As published in the models' own transformer/config.json."""
FLOW_VAE: dict[str, Any] = {
    **PUBLISHED_VAE,
    "sample_size": 1024,
    "latent_channels": 16,
    "force_upcast": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
"""As in SD3.5's and FLUX.1's own vae/config.json, save for scaling and shift."""
T5_XXL_BUT_SHALLOW: dict[str, Any] = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_heads": 64,
    "num_layers": 2,
    "feed_forward_proj": "gated-gelu",
}
"""As published but for the layers, which are 24: a caption is encoded once, and the encoder then released."""


def real_sd35(folder: Path, transformer: dict[str, Any]) -> Path:
    """Stable Diffusion 3.5 at its published size with random weights in bfloat16; few words, a shallow T5."""
    base = sd3(folder)
    with on_the_device(), _in_bfloat16():
        SD3Transformer2DModel(**transformer).save_pretrained(base / "transformer")
        AutoencoderKL(**FLOW_VAE, scaling_factor=1.5305, shift_factor=0.0609).save_pretrained(
            base / "vae"
        )
        published_text(CLIPTextModelWithProjection, CLIP_L, base, "")
        published_text(CLIPTextModelWithProjection, CLIP_BIG_G, base, "_2")
        _shallow_t5(base / "text_encoder_3")
    return base


def real_flux(folder: Path) -> Path:
    """FLUX.1-dev at its published size with random weights in bfloat16; few words, a shallow T5."""
    base = flux(folder)
    with on_the_device(), _in_bfloat16():
        FluxTransformer2DModel(**FLUX_DEV).save_pretrained(base / "transformer")
        AutoencoderKL(**FLOW_VAE, scaling_factor=0.3611, shift_factor=0.1159).save_pretrained(
            base / "vae"
        )
        published_text(CLIPTextModel, CLIP_L, base, "")
        _shallow_t5(base / "text_encoder_2")
    return base


def _shallow_t5(folder: Path) -> None:
    T5EncoderModel(T5Config(vocab_size=len(t5_words()), **T5_XXL_BUT_SHALLOW)).save_pretrained(
        folder
    )


@contextmanager
def _in_bfloat16() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def t5_words() -> T5TokenizerFast:
    """A T5 tokenizer of single characters."""
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocabulary += [(letter, -3.0) for letter in letters]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0)


def gemma_words() -> GemmaTokenizerFast:
    """A Gemma tokenizer of single characters."""
    letters = ["\u2581", "\n", *(chr(code) for code in range(33, 127))]
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters]
    return GemmaTokenizerFast(vocab={name: place for place, name in enumerate(names)}, merges=[])


def t5(words: int, width: int) -> T5EncoderModel:
    """A T5 encoder of two layers."""
    return T5EncoderModel(
        T5Config(
            vocab_size=words, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    ).eval()  # fmt: skip


def shifted_vae() -> AutoencoderKL:
    """The VAE of SD3 and FLUX: 16 channels in the real one, here 4; a shift; no convolutions for moments."""
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=True,
    )


def sd3(folder: Path, *, seed: int = 0, has_t5: bool = True) -> Path:
    """A Stable Diffusion 3.5 medium in diffusers' layout: 64 x 64 pixels, latents 4 x 8 x 8."""
    torch.manual_seed(seed)
    words, words_2 = tokenizer(folder / "words"), tokenizer(folder / "words_2", pad_token="!")
    words_3 = t5_words()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=12 + 20,
        pos_embed_max_size=12,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    _shake(transformer)
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=shifted_vae(),
        text_encoder=CLIPTextModelWithProjection(text_config(len(words), 12, 12)),
        tokenizer=words,
        text_encoder_2=CLIPTextModelWithProjection(text_config(len(words_2), 16, 20)),
        tokenizer_2=words_2,
        text_encoder_3=t5(len(words_3), 32) if has_t5 else None,
        tokenizer_3=words_3 if has_t5 else None,
    ).save_pretrained(folder / "model", safe_serialization=True)
    return with_scheduler(folder / "model", SD3_SCHEDULER)


def flux(folder: Path, *, seed: int = 0, is_schnell: bool = False) -> Path:
    """A FLUX.1 in diffusers' layout, for images of 64 x 64 pixels: latents 4 x 8 x 8 in 16 patches."""
    torch.manual_seed(seed)
    words, words_2 = tokenizer(folder / "words"), t5_words()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=12,
        guidance_embeds=not is_schnell,
        axes_dims_rope=(4, 6, 6),
    )
    _shake(transformer)
    FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=shifted_vae(),
        text_encoder=CLIPTextModel(text_config(len(words), 12, 12)),
        tokenizer=words,
        text_encoder_2=t5(len(words_2), 32),
        tokenizer_2=words_2,
    ).save_pretrained(folder / "model", safe_serialization=True)
    schedule = FLUX_SCHNELL_SCHEDULER if is_schnell else FLUX_DEV_SCHEDULER
    return with_scheduler(folder / "model", schedule)


def sana(folder: Path, *, seed: int = 0) -> Path:
    """A Sana in diffusers' layout: 64 x 64 pixels, latents 4 x 8 x 8."""
    torch.manual_seed(seed)
    words = gemma_words()
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    _shake(transformer)
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8, 16),
        decoder_block_out_channels=(8, 8, 8, 16),
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), (5,)),
        decoder_qkv_multiscales=((), (), (), (5,)),
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=2048,
        )
    ).eval()  # fmt: skip
    SanaPipeline(
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=vae,
        text_encoder=encoder,
        tokenizer=words,
    ).save_pretrained(folder / "model", safe_serialization=True)
    return with_scheduler(folder / "model", SANA_SCHEDULER)


def _shake(network: Any) -> None:
    """Make every weight count: fresh transformers of this kind begin with zeros in their last layers."""
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.02 * torch.randn(weight.shape))
