"""The step-aware preference model of SPO: a PickScore that knows how noisy the latents were.

Liang et al., "Aesthetic Post-Training Diffusion Models from Generic Preferences with Step-by-step Preference
Optimization", Sec. 4.1, with the layout of its published code: each layer of CLIP's vision tower is shifted,
scaled and gated by the timestep (adaLN of Peebles and Xie, "Scalable Diffusion Models with Transformers").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import CLIPConfig, CLIPModel

from stages.core.errors import UserError
from stages.core.models.weight_files import save_weights
from stages.metrics.clip import Prompts, cosines, features, read_clip, read_tokenizer, unit
from stages.metrics.preprocessing import MEAN, STD
from stages.metrics.weights import (
    Published,
    load_strictly,
    read_options,
    read_tensors,
    ready,
    spec_of,
)

ADDRESS = "https://huggingface.co/SPO-Diffusion-Models/Step-Aware_Preference_Models"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
WEIGHTS = "model.safetensors"
FREQUENCIES = 256
"""Width of the sinusoids of a timestep."""
MAX_PERIOD = 10_000.0

Rows = Float[Tensor, "image channel"]


def sinusoids(timesteps: Int[Tensor, " image"]) -> Float[Tensor, "image frequency"]:
    """Cosines, then sines, of a timestep at 128 frequencies from 1 down to nearly 1/10,000."""
    half = FREQUENCIES // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(-math.log(MAX_PERIOD) * steps)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """A vector of the vision tower's width for each timestep."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Int[Tensor, " image"]) -> Rows:
        """The embedding of each timestep."""
        found: Rows = self.mlp(sinusoids(timesteps).to(next(self.parameters()).dtype))
        return found


class StepAwareClip(nn.Module):
    """A CLIP whose vision tower is told the timestep; its tensors have the published names."""

    def __init__(self, config: CLIPConfig) -> None:
        """Weights are random: load a file, or call `start_as_clip`."""
        super().__init__()
        self.model: Any = CLIPModel(config)
        width = config.vision_config.hidden_size
        self.model.t_embedder = TimestepEmbedder(width)
        for layer in self.model.vision_model.encoder.layers:
            layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.model.vision_model.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(width, 2 * width)
        )
        self.is_checkpointed = False

    def enable_gradient_checkpointing(self) -> None:
        """Compute the vision tower's activations twice instead of keeping them."""
        self.is_checkpointed = True

    @torch.no_grad()
    def start_as_clip(self) -> None:
        """Make every timestep change nothing: shifts and scales 0, gates 1. The rest is as it is."""
        vision = self.model.vision_model
        for part in (vision, *vision.encoder.layers):
            part.adaLN_modulation[1].weight.zero_()
            part.adaLN_modulation[1].bias.zero_()
        for layer in vision.encoder.layers:
            for gate in (2, 5):
                layer.adaLN_modulation[1].bias.chunk(6)[gate].fill_(1)
        for number in (0, 2):
            nn.init.normal_(self.model.t_embedder.mlp[number].weight, std=0.02)

    def image_features(
        self, pixels: Float[Tensor, "image rgb height width"], timesteps: Int[Tensor, " image"]
    ) -> Rows:
        """The projected embedding of each image, made from latents of that timestep."""
        vision = self.model.vision_model
        time = self.model.t_embedder(timesteps)
        hidden = vision.pre_layrnorm(vision.embeddings(pixels))
        for layer in vision.encoder.layers:
            if self.is_checkpointed and torch.is_grad_enabled():
                hidden = checkpoint(_layer, layer, hidden, time, use_reentrant=False)
            else:
                hidden = _layer(layer, hidden, time)
        pooled = vision.post_layernorm(hidden[:, 0])
        shift, scale = vision.adaLN_modulation(time).chunk(2, dim=1)
        found: Rows = self.model.visual_projection(pooled * (1 + scale) + shift)
        return found

    def forward(
        self,
        pixels: Float[Tensor, "image rgb height width"],
        timesteps: Int[Tensor, " image"],
        words: Int[Tensor, "prompt word"],
    ) -> Float[Tensor, " image"]:
        """exp(logit_scale) times the cosine of each image and its prompt: log-odds, in float32.

        The images are those of all prompts in order, once or several times over.
        """
        images = unit(self.image_features(pixels, timesteps).float())
        texts = unit(features(self.model.get_text_features(input_ids=words)).float())
        times = len(images) // len(texts)
        return self.model.logit_scale.exp().float() * cosines(images, texts.repeat(times, 1))


def _layer(
    layer: Any, hidden: Float[Tensor, "image token channel"], time: Rows
) -> Float[Tensor, "image token channel"]:
    """A layer of the tower: the time says (shift, scale, gate) of the attention, then of the MLP."""
    changes = layer.adaLN_modulation(time).chunk(6, dim=1)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (each[:, None] for each in changes)
    moved = layer.layer_norm1(hidden) * (1 + scale) + shift
    attended = layer.self_attn(hidden_states=moved, attention_mask=None)[0]
    hidden = hidden + gate * attended
    moved = layer.layer_norm2(hidden) * (1 + mlp_scale) + mlp_shift
    found: Tensor = hidden + mlp_gate * layer.mlp(moved)
    return found


def step_aware_input(
    images: UInt8[np.ndarray, "image height width rgb"], size: int
) -> Float[Tensor, "image rgb size size"]:
    """Short side to `size` by bicubic interpolation without antialiasing, the middle square, normalised.

    Differs from the published code: it sees what the VAE decodes before that is rounded to 8 bits.
    """
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    scale = size / min(pixels.shape[2:])
    height, width = (int(side * scale + 0.5) for side in pixels.shape[2:])
    pixels = functional.interpolate(pixels, size=(height, width), mode="bicubic")
    top, left = (round((side - size) / 2) for side in (height, width))
    pixels = pixels[:, :, top : top + size, left : left + size].clamp(0, 1)
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


class StepAwarePreference:
    """exp(logit_scale) times the cosine of image and prompt, by a network that knows the timestep."""

    def __init__(self, options: Mapping[str, str], device: torch.device) -> None:
        """UserError where the weights are missing, no safetensors, or do not fit."""
        values = read_options("spm", options, {"weights": None, "tokenizer": TOKENIZER}, ADDRESS)
        published = Published(metric="spm", option="weights", address=ADDRESS)
        words = Published(
            metric="spm", option="tokenizer", address=f"https://huggingface.co/{TOKENIZER}"
        )
        network, path = read_step_aware(values["weights"], published)
        self.network: Any = ready(network, device)
        self.device, self.size = device, network.model.config.vision_config.image_size
        self.scale = network.model.logit_scale.exp().item()
        tokenizer = read_tokenizer(values["tokenizer"], words)
        self.prompts = Prompts(network.model, tokenizer, device)
        scale = f"exp(logit_scale)*cos, exp(logit_scale) = {self.scale:.6g}"
        self.spec = spec_of("spm", values, {path.name: path}, scale)

    @torch.inference_mode()
    def __call__(
        self,
        *,
        images: UInt8[np.ndarray, "image height width rgb"],
        prompts: Sequence[str],
        timestep: int,
    ) -> Float[np.ndarray, " image"]:
        """The score of each image, made from latents of that timestep; 0 for finished ones."""
        pixels = step_aware_input(images, self.size).to(self.device)
        timesteps = torch.full((len(images),), timestep, device=self.device)
        rows = unit(self.network.image_features(pixels, timesteps))
        found = self.scale * cosines(rows, self.prompts.embed(prompts))
        return found.float().cpu().numpy()


def read_step_aware(source: str, published: Published) -> tuple[StepAwareClip, Path]:
    """A network from a .safetensors file of the published names, and the file; its CLIP's config.json lies beside.

    UserError for a pickle, and for a tensor that is missing, left over or of another shape.
    """
    if Path(source).suffix in (".bin", ".pt", ".pth"):
        raise UserError(
            f"{published.key} is {source!r}, a pickle; expected .safetensors. Convert it once: docs/online.md has "
            "the four lines"
        )
    path = published.find(source, [WEIGHTS])
    config = CLIPConfig.from_pretrained(str(published.beside(str(path), "config.json").parent))
    with torch.device("meta"):
        network = StepAwareClip(config)
    load_strictly(network, read_tensors(path), path, unused=("*.position_ids",))
    return network, path


def begin_step_aware(source: str, published: Published, seed: int) -> tuple[StepAwareClip, Path]:
    """A network that is the CLIP of a folder or hub id at every timestep, and the CLIP's file.

    `seed` draws what has no effect yet. UserError where the weights are missing or do not fit.
    """
    clip, path = read_clip(source, published, has_text=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = StepAwareClip(clip.config)
        network.start_as_clip()
    network.model.load_state_dict(clip.state_dict(), strict=False)
    return network, path


def save_step_aware(network: StepAwareClip, folder: Path) -> None:
    """Write a network as `read_step_aware` finds it: the published names, and the config of its CLIP."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(network.state_dict(), folder / WEIGHTS, {"format": "pt"})
    network.model.config.to_json_file(folder / "config.json", use_diff=False)
