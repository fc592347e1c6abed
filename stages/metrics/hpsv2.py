"""HPSv2 (Wu et al. 2023): a CLIP ViT-H/14 fine-tuned on HPD v2, from its published open_clip file."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from stages.core.errors import UserError
from stages.metrics.clip import Pictures, Prompts, cosines, read_tokenizer
from stages.metrics.preprocessing import Picture, hpsv2_input
from stages.metrics.weights import (
    Origin,
    Published,
    Reader,
    Tensors,
    count_layers,
    load_strictly,
    read_options,
    read_tensors,
    shape_of,
    spec_of,
)

ADDRESS = "https://huggingface.co/xswu/HPSv2"
FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
VISION_HEAD, TEXT_HEAD = 80, 64
"""Channels of an attention head in ViT-H-14; no tensor's shape tells them."""

BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
ELSEWHERE = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "logit_scale": "logit_scale",
}
NORMS = {
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "text_model.final_layer_norm": "ln_final",
}
TOWERS = {"vision_model": "visual.transformer", "text_model": "transformer"}
PROJECTIONS = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}  # fmt: skip


class HPSv2:
    """100 times the cosine of picture and prompt; about 26 to 29 for v2.0, less for v2.1."""

    def __init__(self, options: Mapping[str, str], device: torch.device) -> None:
        defaults = {"weights": None, "version": "v2.0", "tokenizer": TOKENIZER, "antialias": "True"}
        values = read_options("hpsv2", options, defaults, ADDRESS)
        published = Published(metric="hpsv2", option="weights", address=ADDRESS)
        words = Published(
            metric="hpsv2", option="tokenizer", address=f"https://huggingface.co/{TOKENIZER}"
        )
        path = published.find(values["weights"], [file_of(values)])
        check_version(path, values["version"])
        model = read_open_clip(path)
        preprocess = partial(hpsv2_input, antialias=_is_true(values["antialias"]))
        self.pictures = Pictures(model, device, preprocess)
        self.prompts = Prompts(
            model, read_tokenizer(values["tokenizer"], words), device, clean=clean_prompt
        )
        self.spec = spec_of("hpsv2", values, {path.name: path}, "100*cos")

    def __call__(
        self, *, images: Sequence[Picture], prompts: Sequence[str]
    ) -> Float[np.ndarray, " image"]:
        """The score of each image."""
        rows = cosines(self.pictures.embed(images), self.prompts.embed(prompts))
        return (100 * rows).float().cpu().numpy()


def clean_prompt(prompt: str) -> str:
    """The prompt as open_clip's tokenizer sees it: mended text, no HTML entities, single spaces."""
    mended = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return " ".join(mended.split())


def read_open_clip(path: Path, read: Reader = read_tensors) -> CLIPModel:
    """An open_clip CLIP as transformers' CLIPModel; sizes are read from the tensors' shapes."""
    tensors = read(path)
    with torch.device("meta"):
        model = CLIPModel(_config(tensors, path))
    load_strictly(model, tensors, path, origin=open_clip_name)
    return model


def open_clip_name(name: str) -> Origin:
    """Where a tensor of transformers' CLIPModel lies in an open_clip file."""
    if name in ELSEWHERE:
        return Origin(name=ELSEWHERE[name])
    if name in PROJECTIONS:
        return Origin(name=PROJECTIONS[name], take=lambda tensor: tensor.T)
    owner, _, kind = name.rpartition(".")
    if owner in NORMS:
        return Origin(name=f"{NORMS[owner]}.{kind}")
    tower, _encoder, _layers, number, part = owner.split(".", 4)
    block = f"{TOWERS[tower]}.resblocks.{number}"
    if part in BLOCK:
        return Origin(name=f"{block}.{BLOCK[part]}.{kind}")
    third = ("q_proj", "k_proj", "v_proj").index(part.removeprefix("self_attn."))
    return Origin(name=f"{block}.attn.in_proj_{kind}", take=partial(_third, third))


def _third(index: int, tensor: Tensor) -> Tensor:
    if tensor.shape[0] % 3:
        raise ValueError("not three parts")
    return tensor.chunk(3)[index]


def _config(tensors: Tensors, path: Path) -> CLIPConfig:
    width, _rgb, patch, _patch = shape_of(tensors, "visual.conv1.weight", path)
    positions, _width = shape_of(tensors, "visual.positional_embedding", path)
    num_words, text_width = shape_of(tensors, "token_embedding.weight", path)
    length, _width = shape_of(tensors, "positional_embedding", path)
    shared: dict[str, Any] = {"hidden_act": "gelu", "layer_norm_eps": 1e-5}
    vision = {
        "hidden_size": width,
        "intermediate_size": _wide(tensors, "visual.transformer", path),
        "num_hidden_layers": count_layers(
            tensors, "visual.transformer.resblocks.", width, {1280: 32}
        ),
        "num_attention_heads": max(1, width // VISION_HEAD),
        "image_size": patch * round((positions - 1) ** 0.5),
        "patch_size": patch,
    }
    text = {
        "hidden_size": text_width,
        "intermediate_size": _wide(tensors, "transformer", path),
        "num_hidden_layers": count_layers(
            tensors, "transformer.resblocks.", text_width, {1024: 24}
        ),
        "num_attention_heads": max(1, text_width // TEXT_HEAD),
        "max_position_embeddings": length,
        "vocab_size": num_words,
        "bos_token_id": num_words - 2,
        "eos_token_id": num_words - 1,
        "pad_token_id": num_words - 1,
    }
    projection = shape_of(tensors, "visual.proj", path)[1]
    return CLIPConfig(
        vision_config=shared | vision, text_config=shared | text, projection_dim=projection
    )


def _wide(tensors: Tensors, tower: str, path: Path) -> int:
    return shape_of(tensors, f"{tower}.resblocks.0.mlp.c_fc.weight", path)[0]


def file_of(options: Mapping[str, str]) -> str:
    """Name of the published file; UserError for a version that there is none of."""
    version = options["version"]
    if version not in FILES:
        raise UserError(
            f"metrics.hpsv2.version is {version!r}; expected one of {', '.join(FILES)} (the paper's "
            "scale is v2.0's)"
        )
    return FILES[version]


def check_version(path: Path, version: str) -> None:
    """UserError where the file's name says another version."""
    other = {file: name for name, file in FILES.items()}.get(path.name)
    if other not in (None, version):
        raise UserError(
            f"metrics.hpsv2.weights is {str(path)!r}, the file of {other}, but metrics.hpsv2.version "
            f"is {version!r}; their scales differ. Set the version to {other!r} or take "
            f"{FILES[version]}."
        )


def _is_true(text: str) -> bool:
    if text not in ("True", "False"):
        raise UserError(f"metrics.hpsv2.antialias is {text!r}; expected true or false")
    return text == "True"
