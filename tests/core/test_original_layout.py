"""Every weight of the published models has its published name in the original layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from stages.core.models.original_layout import checkpoint, unet_key
from tests.tiny_models import SD15_UNET, SDXL_UNET

VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
CLIP_L = CLIPTextConfig(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    projection_dim=768,
)
CLIP_BIG_G = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
)

NAMES = {
    "sd15": {
        "model.diffusion_model.time_embed.0.weight": (1280, 320),
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        "model.diffusion_model.middle_block.1.proj_in.weight": (1280, 1280, 1, 1),
        "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "first_stage_model.decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
    },
    "sdxl": {
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.input_blocks.4.1.proj_in.weight": (640, 640),
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_v.weight": (
            1280,
            2048,
        ),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        "conditioner.embedders.1.model.positional_embedding": (77, 1280),
    },
}
"""As in the published v1-5-pruned-emaonly and sd_xl_base_1.0 files."""


@pytest.mark.parametrize(
    ("family", "config", "counts"),
    [
        # Weights of UNet, VAE and text encoders, without CLIP's position_ids buffer.
        ("sd15", SD15_UNET, (686, 248, 196)),
        ("sdxl", SDXL_UNET, (1680, 248, 196 + 388 + 1)),
    ],
)
def test_every_weight_of_the_published_sizes_is_named_and_comes_back(
    family: str, config: dict[str, Any], counts: tuple[int, int, int]
) -> None:
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**config), AutoencoderKL(**VAE)
        text = CLIPTextModel(CLIP_L).state_dict()
        text_2 = CLIPTextModelWithProjection(CLIP_BIG_G).state_dict() if family == "sdxl" else None
    whole = checkpoint(unet.state_dict(), unet.config, vae.state_dict(), text, text_2)
    prefixes = ("model.diffusion_model.", "first_stage_model.", ("cond", "conditioner."))
    found = tuple(sum(key.startswith(prefix) for key in whole) for prefix in prefixes)
    assert found == counts
    assert len(whole) == sum(counts)
    for name, shape in NAMES[family].items():
        assert tuple(whole[name].shape) == shape, name
    shapes = {key: tuple(value.shape) for key, value in unet.state_dict().items()}
    back = single_file_utils.convert_ldm_unet_checkpoint(dict(whole), config=dict(unet.config))
    assert {key: tuple(value.shape) for key, value in back.items()} == shapes
    back = single_file_utils.convert_ldm_vae_checkpoint(dict(whole), config=dict(vae.config))
    expected = {key: tuple(value.shape) for key, value in vae.state_dict().items()}
    assert set(back) == set(expected)
    for key, value in back.items():
        assert tuple(value.shape)[: len(expected[key])] == expected[key]


def test_a_name_of_no_unet_is_refused() -> None:
    with pytest.raises(KeyError, match="no weight of a Stable Diffusion"):
        unet_key("transformer_blocks.0.attn.to_q.weight", {"layers_per_block": 2})


def test_a_downsampler_is_called_as_kohyas_loras_call_it() -> None:
    config = {"layers_per_block": 2, "up_block_types": ["UpBlock2D"] * 3}
    layer = "down_blocks.0.downsamplers.0.conv"
    assert unet_key(layer, config) == "input_blocks.3.0.op"
    assert unet_key(f"{layer}.weight", config) == "input_blocks.3.0.op.weight"
