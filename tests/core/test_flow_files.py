"""Flow-matching models at their published sizes on the meta device, and from single files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import FluxTransformer2DModel, SanaTransformer2DModel, SD3Transformer2DModel
from diffusers.loaders import single_file_utils

from stages.core.method.noising import generator
from stages.core.models.families import load_model
from stages.core.models.flux import Flux
from stages.core.models.loading import ModelError
from stages.core.models.stable_diffusion_3 import StableDiffusion3
from tests import flow_models
from tests.builders import settings
from tests.sd3_file import original_weights

CPU = torch.device("cpu")

SIZES = [
    (SD3Transformer2DModel, flow_models.SD35_MEDIUM, 2_243_171_520, 908),
    (SD3Transformer2DModel, flow_models.SD35_LARGE, 8_056_627_520, 1226),
    (FluxTransformer2DModel, flow_models.FLUX_DEV, 11_901_408_320, 1160),
    (SanaTransformer2DModel, flow_models.SANA_1600M, 1_604_462_752, 396),
]
"""Class, published config, weights in all, tensors."""
NAMES = {
    "medium": {
        "x_embedder.proj.weight": (1536, 16, 2, 2),
        "pos_embed": (1, 384 * 384, 1536),
        "context_embedder.weight": (1536, 4096),
        "y_embedder.mlp.0.weight": (1536, 2048),
        "joint_blocks.0.x_block.attn2.qkv.weight": (3 * 1536, 1536),
        "joint_blocks.0.x_block.adaLN_modulation.1.weight": (9 * 1536, 1536),
        "joint_blocks.23.context_block.adaLN_modulation.1.weight": (2 * 1536, 1536),
        "joint_blocks.23.x_block.attn.ln_q.weight": (64,),
        "final_layer.linear.weight": (64, 1536),
    },
    "large": {
        "pos_embed": (1, 192 * 192, 2432),
        "joint_blocks.37.x_block.attn.qkv.weight": (3 * 2432, 2432),
        "joint_blocks.37.x_block.adaLN_modulation.1.weight": (6 * 2432, 2432),
    },
}
"""Some of the keys of the published checkpoints with their shapes."""


@pytest.mark.parametrize(("kind", "config", "weights", "tensors"), SIZES)
def test_published_architectures_have_their_number_of_weights(
    kind: Any, config: dict[str, Any], weights: int, tensors: int
) -> None:
    with torch.device("meta"):
        network = kind(**config)
    assert sum(value.numel() for value in network.parameters()) == weights
    assert len(list(network.parameters())) == tensors


@pytest.mark.parametrize(
    ("name", "config"), [("medium", flow_models.SD35_MEDIUM), ("large", flow_models.SD35_LARGE)]
)
def test_every_weight_of_sd35_is_named_as_published_and_comes_back(
    name: str, config: dict[str, Any]
) -> None:
    with torch.device("meta"):
        state = SD3Transformer2DModel(**config).state_dict()
    whole = original_weights(state)
    for key, shape in NAMES[name].items():
        assert tuple(whole[f"model.diffusion_model.{key}"].shape) == shape, key
    back = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(dict(whole))
    assert {key: value.shape for key, value in back.items()} == {
        key: value.shape for key, value in state.items()
    }


@pytest.mark.parametrize(
    ("adapter", "config", "folder"),
    [
        (StableDiffusion3, flow_models.SD35_MEDIUM, "sd3"),
        (StableDiffusion3, flow_models.SD35_LARGE, "sd3"),
        (Flux, flow_models.FLUX_DEV, "flux"),
    ],
)
def test_lora_targets_fit_layers_of_every_block_of_the_published_size(
    adapter: Any, config: dict[str, Any], folder: str
) -> None:
    with torch.device("meta"):
        network = adapter.denoiser_class(**config)
    layers = [
        name for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(adapter.lora_targets)
    ]  # fmt: skip
    blocks = {tuple(name.split(".")[:2]) for name in layers}
    count = config["num_layers"] + config.get("num_single_layers", 0)
    assert len(blocks) == count
    assert len(layers) >= 3 * count


def test_a_single_file_of_sd3_is_its_transformer_and_the_rest_comes_from_the_config(
    tmp_path: Path,
) -> None:
    base = flow_models.sd3(tmp_path)
    folder = load_model(settings(base), device=CPU)
    path = tmp_path / "sd3.safetensors"
    weights = original_weights(folder.load_denoiser().network.state_dict())
    safetensors.torch.save_file({k: v.contiguous() for k, v in weights.items()}, path)
    single = load_model(settings(path, config=str(base)), device=CPU)
    assert type(single) is StableDiffusion3
    assert single.latents_shape == folder.latents_shape
    text = folder.encode_text(["a cat", ""])
    assert torch.equal(single.encode_text(["a cat", ""])["text"], text["text"])
    latents = torch.randn((2, *folder.latents_shape), generator=generator(0))
    steps = torch.tensor([10, 900])
    found, expected = (
        model.predict(model.load_denoiser(), latents, steps, text) for model in (single, folder)
    )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelError, match=r"is read as a transformer alone; name as model\.config"):
        load_model(settings(path), device=CPU)
    other = flow_models.sd3(tmp_path / "other", has_t5=False)
    (other / "transformer" / "config.json").write_text(
        (base / "transformer" / "config.json")
        .read_text()
        .replace('"num_layers": 3', '"num_layers": 2')
    )
    with pytest.raises(ModelError, match="could not be read as the transformer of"):
        load_model(settings(path, config=str(other)), device=CPU).load_denoiser()


def test_a_single_file_of_flux_is_known_by_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "flux1-dev.safetensors"
    safetensors.torch.save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(3, 1)}, path)
    base = flow_models.flux(tmp_path)
    model = load_model(settings(path, config=str(base), image_size=(64, 64)), device=CPU)
    assert type(model) is Flux
    assert model.encode_text(["a cat"])["pooled"].shape == (1, 12)
