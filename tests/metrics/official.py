"""Random weights in the published files' own layouts, small; and vocabularies for them.

Written from the published code's modules (open_clip's CLIP, ImageReward's BLIP, the LAION head), not
from what the scorers expect.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from tests.tiny_models import tokenizer

Weights = dict[str, Tensor]

SIZE = 28
"""Side of the pictures that the small networks see: 2 x 2 patches of 14 pixels."""


class Maker:
    """Named random tensors, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        self.weights: Weights = {}

    def tensor(self, name: str, *shape: int, scale: float = 0.15, around: float = 0) -> None:
        self.weights[name] = around + scale * torch.randn(shape, generator=self.rng)

    def linear(self, name: str, rows: int, columns: int) -> None:
        self.tensor(f"{name}.weight", rows, columns)
        self.tensor(f"{name}.bias", rows)

    def norm(self, name: str, width: int) -> None:
        self.tensor(f"{name}.weight", width, around=1)
        self.tensor(f"{name}.bias", width)


def open_clip(num_words: int, *, layers: int = 2, seed: int = 0) -> Weights:
    """open_clip's CLIP as in HPS_v2_compressed.pt's state_dict: heads of 80 and 64 channels."""
    make, vision, text, projection = Maker(seed), 160, 128, 48
    make.tensor("positional_embedding", 77, text)
    make.tensor("text_projection", text, projection)
    make.tensor("logit_scale", around=4.6, scale=0)
    make.tensor("visual.class_embedding", vision)
    make.tensor("visual.positional_embedding", 5, vision)
    make.tensor("visual.proj", vision, projection)
    make.tensor("visual.conv1.weight", vision, 3, 14, 14)
    make.tensor("token_embedding.weight", num_words, text)
    for name, width in (("visual.ln_pre", vision), ("visual.ln_post", vision), ("ln_final", text)):
        make.norm(name, width)
    for tower, width in (("visual.transformer", vision), ("transformer", text)):
        for number in range(layers):
            block = f"{tower}.resblocks.{number}"
            make.norm(f"{block}.ln_1", width)
            make.tensor(f"{block}.attn.in_proj_weight", 3 * width, width)
            make.tensor(f"{block}.attn.in_proj_bias", 3 * width)
            make.linear(f"{block}.attn.out_proj", width, width)
            make.norm(f"{block}.ln_2", width)
            make.linear(f"{block}.mlp.c_fc", 4 * width, width)
            make.linear(f"{block}.mlp.c_proj", width, 4 * width)
    return make.weights


def image_reward(num_words: int, *, layers: int = 2, seed: int = 0) -> Weights:
    """ImageReward.pt: BLIP's ViT and BERT with heads of 64 channels, unused projections, the head."""
    make, vision, text = Maker(seed), 128, 64
    eye, words = "blip.visual_encoder", "blip.text_encoder"
    make.tensor(f"{eye}.cls_token", 1, 1, vision)
    make.tensor(f"{eye}.pos_embed", 1, 5, vision)
    make.tensor(f"{eye}.patch_embed.proj.weight", vision, 3, 14, 14)
    make.tensor(f"{eye}.patch_embed.proj.bias", vision)
    for number in range(layers):
        block = f"{eye}.blocks.{number}"
        make.norm(f"{block}.norm1", vision)
        make.linear(f"{block}.attn.qkv", 3 * vision, vision)
        make.linear(f"{block}.attn.proj", vision, vision)
        make.norm(f"{block}.norm2", vision)
        make.linear(f"{block}.mlp.fc1", 4 * vision, vision)
        make.linear(f"{block}.mlp.fc2", vision, 4 * vision)
    make.norm(f"{eye}.norm", vision)
    make.weights[f"{words}.embeddings.position_ids"] = torch.arange(64)[None]
    make.tensor(f"{words}.embeddings.word_embeddings.weight", num_words, text)
    make.tensor(f"{words}.embeddings.position_embeddings.weight", 64, text)
    make.norm(f"{words}.embeddings.LayerNorm", text)
    for number in range(layers):
        layer = f"{words}.encoder.layer.{number}"
        for kind, seen in (("attention", text), ("crossattention", vision)):
            make.linear(f"{layer}.{kind}.self.query", text, text)
            make.linear(f"{layer}.{kind}.self.key", text, seen)
            make.linear(f"{layer}.{kind}.self.value", text, seen)
            make.linear(f"{layer}.{kind}.output.dense", text, text)
            make.norm(f"{layer}.{kind}.output.LayerNorm", text)
        make.linear(f"{layer}.intermediate.dense", 4 * text, text)
        make.linear(f"{layer}.output.dense", text, 4 * text)
        make.norm(f"{layer}.output.LayerNorm", text)
    make.linear("blip.vision_proj", 16, vision)
    make.linear("blip.text_proj", 16, text)
    make.weights |= {f"mlp.{name}": value for name, value in head(text, seed=seed + 1).items()}
    return make.weights


def head(width: int, *, seed: int = 0) -> Weights:
    """The linear layers of sac+logos+ava1-l14-linearMSE.pth, for embeddings of `width`."""
    make, sizes = Maker(seed), (width, 1024, 128, 64, 16, 1)
    for place, columns, rows in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        make.tensor(f"layers.{place}.weight", rows, columns, scale=columns**-0.5)
        make.tensor(f"layers.{place}.bias", rows)
    return make.weights


def clip_folder(folder: Path, *, activation: str, projection: int = 48, seed: int = 0) -> Path:
    """A CLIP in transformers' layout with its tokenizer, with position_ids as old files have them."""
    num_words = len(tokenizer(folder))
    torch.manual_seed(seed)
    shared = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": activation}
    config = CLIPConfig(
        text_config=shared
        | {
            "hidden_size": 32,
            "intermediate_size": 64,
            "vocab_size": num_words,
            "eos_token_id": 2,
            "bos_token_id": 0,
            "pad_token_id": 1,
        },
        vision_config=shared
        | {
            "hidden_size": 40,
            "intermediate_size": 80,
            "image_size": SIZE,
            "patch_size": 14,
        },
        projection_dim=projection,
    )
    model = CLIPModel(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim():
                weight.add_(0.1 * torch.randn_like(weight))
    config.save_pretrained(folder)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def bert_vocabulary(path: Path) -> int:
    """A WordPiece vocabulary of single letters; the number of its words."""
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    path.write_text("\n".join(words) + "\n")
    return len(words)
