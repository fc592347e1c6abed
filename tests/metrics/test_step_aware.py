"""The step-aware preference model: CLIP at first, its published names, its adaLN by hand, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import CLIPModel

from stages.core.errors import UserError
from stages.metrics.step_aware import (
    StepAwareClip,
    StepAwarePreference,
    sinusoids,
    step_aware_input,
)
from tests.metrics.conftest import PROMPTS, Published

CPU = torch.device("cpu")


@pytest.fixture
def network(published: Published) -> StepAwareClip:
    """Begun as the small PickScore."""
    clip = CLIPModel.from_pretrained(published.folder / "pickscore")
    torch.manual_seed(4)
    made = StepAwareClip(clip.config)
    made.model.load_state_dict(clip.state_dict(), strict=False)
    made.start_as_clip()
    return made.eval()


@pytest.fixture
def folder(network: StepAwareClip, published: Published, tmp_path: Path) -> Path:
    """Its file beside the config of its CLIP, with the positions that older files hold."""
    tensors = {name: value.contiguous() for name, value in network.state_dict().items()}
    tensors["model.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    config = (published.folder / "pickscore" / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    return tmp_path


def options(folder: Path, published: Published) -> dict[str, str]:
    return {"weights": str(folder), "tokenizer": str(published.folder / "words")}


@pytest.mark.parametrize("timestep", [0, 1, 501, 999])
def test_it_begins_as_clip_at_every_timestep(
    network: StepAwareClip, published: Published, timestep: int
) -> None:
    clip = CLIPModel.from_pretrained(published.folder / "pickscore").eval()
    size = clip.config.vision_config.image_size
    pixels = torch.randn((2, 3, size, size), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = clip.get_image_features(pixel_values=pixels).pooler_output
        found = network.image_features(pixels, torch.full((2,), timestep))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_its_tensors_have_the_published_names_and_shapes(network: StepAwareClip) -> None:
    width = network.model.config.vision_config.hidden_size
    names = network.state_dict()
    own = {name: tuple(v.shape) for name, v in names.items() if "adaLN" in name or "t_emb" in name}
    layers = range(network.model.config.vision_config.num_hidden_layers)
    assert own == {
        "model.t_embedder.mlp.0.weight": (width, 256),
        "model.t_embedder.mlp.0.bias": (width,),
        "model.t_embedder.mlp.2.weight": (width, width),
        "model.t_embedder.mlp.2.bias": (width,),
        "model.vision_model.adaLN_modulation.1.weight": (2 * width, width),
        "model.vision_model.adaLN_modulation.1.bias": (2 * width,),
        **{
            f"model.vision_model.encoder.layers.{n}.adaLN_modulation.1.{part}": shape
            for n in layers
            for part, shape in (("weight", (6 * width, width)), ("bias", (6 * width,)))
        },
    }
    assert "model.text_model.embeddings.token_embedding.weight" in names
    assert "model.logit_scale" in names


def test_a_timestep_that_shifts_and_gates_changes_a_layer_as_the_paper_says(
    network: StepAwareClip,
) -> None:
    rng = torch.Generator().manual_seed(2)
    vision = network.model.vision_model
    with torch.no_grad():
        for part in (vision, *vision.encoder.layers):
            part.adaLN_modulation[1].weight.normal_(std=0.05, generator=rng)
    size = network.model.config.vision_config.image_size
    pixels = torch.randn((2, 3, size, size), generator=rng)
    timesteps = torch.tensor([3, 800])
    with torch.no_grad():
        found = network.image_features(pixels, timesteps)
        time = functional.silu(network.model.t_embedder(timesteps))
        hidden = vision.pre_layrnorm(vision.embeddings(pixels))
        for layer in vision.encoder.layers:
            linear = layer.adaLN_modulation[1]
            c = (time @ linear.weight.T + linear.bias).reshape(2, 6, 1, -1)
            inner = layer.layer_norm1(hidden) * (1 + c[:, 1]) + c[:, 0]
            hidden = hidden + layer.self_attn(inner, attention_mask=None)[0] * c[:, 2]
            inner = layer.layer_norm2(hidden) * (1 + c[:, 4]) + c[:, 3]
            hidden = hidden + layer.mlp(inner) * c[:, 5]
        last = vision.adaLN_modulation[1]
        c = (time @ last.weight.T + last.bias).reshape(2, 2, -1)
        pooled = vision.post_layernorm(hidden[:, 0]) * (1 + c[:, 1]) + c[:, 0]
        expected = pooled @ network.model.visual_projection.weight.T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_sinusoids_of_a_timestep_by_hand() -> None:
    found = sinusoids(torch.tensor([0, 7]))
    assert found.shape == (2, 256)
    assert found[0].tolist() == [1.0] * 128 + [0.0] * 128
    for place in (0, 1, 127):
        angle = 7 * 10_000 ** (-place / 128)
        assert float(found[1, place]) == pytest.approx(np.cos(angle), abs=1e-5)
        assert float(found[1, 128 + place]) == pytest.approx(np.sin(angle), abs=1e-5)


def test_a_saved_network_is_read_and_scores_the_same_whatever_the_batch(
    network: StepAwareClip, folder: Path, published: Published, pictures: NDArray[np.uint8]
) -> None:
    scorer = StepAwarePreference(options(folder, published), CPU)
    together = scorer(images=pictures, prompts=PROMPTS, timestep=501)
    alone = [
        float(scorer(images=pictures[n : n + 1], prompts=PROMPTS[n : n + 1], timestep=501)[0])
        for n in range(4)
    ]
    assert together.tolist() == pytest.approx(alone, rel=1e-4)
    pixels = step_aware_input(pictures, scorer.size)
    with torch.no_grad():
        rows = network.image_features(pixels, torch.full((4,), 501))
        tokens = scorer.prompts.tokens(PROMPTS)
        texts = network.model.get_text_features(input_ids=tokens).pooler_output
        expected = network.model.logit_scale.exp() * functional.cosine_similarity(rows, texts)
    assert together.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert set(scorer.spec["weights"]) == {"model.safetensors"}


def test_pictures_are_resized_without_antialiasing_and_clamped(pictures: NDArray[np.uint8]) -> None:
    found = step_aware_input(pictures, 20)  # 40 x 48 pixels: short side to 20, long to 24
    plain = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    small = functional.interpolate(plain, size=(20, 24), mode="bicubic", align_corners=False)
    middle = (small[:, :, :, 2:22] / 2 + 0.5).clamp(0, 1)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(1, 3, 1, 1)
    torch.testing.assert_close(found, (middle - mean) / std, rtol=1e-4, atol=1e-4)


def test_pickles_missing_weights_and_missing_tensors_are_refused(
    folder: Path, published: Published
) -> None:
    named = options(folder, published)
    with pytest.raises(UserError, match=r"metrics.spm.weights is .*, a pickle; expected .safetens"):
        StepAwarePreference({**named, "weights": "sd-v1-5_step-aware_preference_model.bin"}, CPU)
    with pytest.raises(UserError, match=r"needs metrics.spm.weights in the config"):
        StepAwarePreference({"tokenizer": named["tokenizer"]}, CPU)
    with pytest.raises(UserError, match=r"there is no such file or folder"):
        StepAwarePreference({**named, "weights": "nowhere/else/at-all"}, CPU)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.t_embedder.mlp.0.bias"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"missing 'model.t_embedder.mlp.0.bias'"):
        StepAwarePreference(named, CPU)
    assert json.loads((folder / "config.json").read_text())["projection_dim"]
