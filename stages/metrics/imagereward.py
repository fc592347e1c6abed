"""ImageReward (Xu et al. 2023): a BLIP that reads prompt and picture together, and a linear head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)

from stages.metrics.heads import Head
from stages.metrics.preprocessing import Picture, imagereward_input
from stages.metrics.weights import (
    Origin,
    Published,
    Reader,
    Tensors,
    count_layers,
    load_strictly,
    read_options,
    read_tensors,
    ready,
    shape_of,
    spec_of,
)

FILE = "ImageReward.pt"
ADDRESS = "https://huggingface.co/THUDM/ImageReward"
TOKENIZER = "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw rewards on the authors' test set; they make a reward of 0 an average picture."""

NUM_WORDS_READ = 35
"""Word pieces of a prompt; what is beyond does not count."""

HEAD_CHANNELS = 64
"""Channels of an attention head, in ViT-L as in BERT; no tensor's shape tells them."""

VISION, TEXT = "blip.visual_encoder", "blip.text_encoder"
UNUSED = ("*position_ids", "blip.vision_proj.*", "blip.text_proj.*")
"""BLIP's contrastive projections, which ImageReward never calls."""

EMBEDDINGS = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding": "pos_embed",
    "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
    "embeddings.patch_embedding.bias": "patch_embed.proj.bias",
}
BLOCK = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "self_attn.qkv": "attn.qkv",
    "self_attn.projection": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


class Network(nn.Module):
    """Prompt and picture in, one raw reward out."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig) -> None:
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.mlp = Head(text.hidden_size)

    def forward(
        self,
        pixels: Float[Tensor, "image rgb height width"],
        tokens: Int[Tensor, "image word"],
        is_word: Int[Tensor, "image word"],
    ) -> Float[Tensor, " image"]:
        """The head's number of the first word's state, which has seen the whole picture."""
        patches = self.vision(pixel_values=pixels).last_hidden_state
        states = self.text(
            input_ids=tokens,
            attention_mask=is_word,
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], device=patches.device),
            is_decoder=False,  # or every word would see only those before it
        ).last_hidden_state
        reward: Tensor = self.mlp(states[:, 0])
        return reward


class ImageReward:
    """Standardised reward; 0 is average, most of Stable Diffusion's lie in -2 to 2."""

    def __init__(self, options: Mapping[str, str], device: torch.device) -> None:
        defaults = {"weights": None, "tokenizer": TOKENIZER}
        values = read_options("imagereward", options, defaults, ADDRESS)
        published = Published(metric="imagereward", option="weights", address=ADDRESS)
        words = Published(
            metric="imagereward", option="tokenizer", address=f"https://huggingface.co/{TOKENIZER}"
        )
        path = published.find(values["weights"], [FILE])
        network = read_network(path)
        self.size: int = network.vision.config.image_size
        self.network, self.device = ready(network, device), device
        vocabulary = words.beside(values["tokenizer"], "vocab.txt")
        self.tokenizer = BertTokenizer(vocab=str(vocabulary), do_lower_case=True)
        self.spec = spec_of("imagereward", values, {path.name: path}, f"(raw - {MEAN}) / {STD}")

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Word numbers of fixed length, and which of them are words."""
        found = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=NUM_WORDS_READ,
            return_tensors="pt",
        )
        return found.input_ids, found.attention_mask

    @torch.inference_mode()
    def __call__(
        self, *, images: Sequence[Picture], prompts: Sequence[str]
    ) -> Float[np.ndarray, " image"]:
        """The reward of each image."""
        pixels = torch.stack([imagereward_input(image, self.size) for image in images])
        tokens, is_word = self.tokens(prompts)
        raw = self.network(pixels.to(self.device), tokens.to(self.device), is_word.to(self.device))
        return ((raw - MEAN) / STD).float().cpu().numpy()


def read_network(path: Path, read: Reader = read_tensors) -> Network:
    """The published network; sizes are read from the tensors' shapes."""
    tensors = read(path)
    with torch.device("meta"):
        network = Network(*_configs(tensors, path))
    load_strictly(network, tensors, path, origin=published_name, unused=UNUSED)
    return network


def published_name(name: str) -> Origin:
    """Where a tensor of `Network` lies in ImageReward.pt."""
    part, _, rest = name.partition(".")
    if part == "mlp":
        return Origin(name=name)
    if part == "text":
        return Origin(name=f"{TEXT}.{rest}")
    if rest in EMBEDDINGS:
        return Origin(name=f"{VISION}.{EMBEDDINGS[rest]}")
    owner, _, kind = rest.rpartition(".")
    if owner == "post_layernorm":
        return Origin(name=f"{VISION}.norm.{kind}")
    _encoder, _layers, number, inner = owner.split(".", 3)
    return Origin(name=f"{VISION}.blocks.{number}.{BLOCK[inner]}.{kind}")


def _configs(tensors: Tensors, path: Path) -> tuple[BlipVisionConfig, BlipTextConfig]:
    width, _rgb, patch, _patch = shape_of(tensors, f"{VISION}.patch_embed.proj.weight", path)
    positions = shape_of(tensors, f"{VISION}.pos_embed", path)[1]
    num_words, text_width = shape_of(tensors, f"{TEXT}.embeddings.word_embeddings.weight", path)
    length = shape_of(tensors, f"{TEXT}.embeddings.position_embeddings.weight", path)[0]
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=shape_of(tensors, f"{VISION}.blocks.0.mlp.fc1.weight", path)[0],
        num_hidden_layers=count_layers(tensors, f"{VISION}.blocks.", width, {1024: 24}),
        num_attention_heads=max(1, width // HEAD_CHANNELS),
        image_size=patch * round((positions - 1) ** 0.5),
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    wide = shape_of(tensors, f"{TEXT}.encoder.layer.0.intermediate.dense.weight", path)[0]
    text = BlipTextConfig(
        vocab_size=num_words,
        hidden_size=text_width,
        encoder_hidden_size=width,  # not the 768 of med_config.json, which the published code overrides
        intermediate_size=wide,
        num_hidden_layers=count_layers(tensors, f"{TEXT}.encoder.layer.", text_width, {768: 12}),
        num_attention_heads=max(1, text_width // HEAD_CHANNELS),
        max_position_embeddings=length,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        is_decoder=True,  # builds the attention to the picture; no word is masked, see forward
        bos_token_id=0,
        eos_token_id=0,
        sep_token_id=0,
        pad_token_id=0,
    )
    return vision, text
