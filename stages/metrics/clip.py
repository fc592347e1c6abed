"""CLIP as several metrics need it: unit embeddings of pictures and of prompts, in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

from stages.metrics.preprocessing import Picture, clip_input
from stages.metrics.weights import (
    MODEL_FILES,
    Published,
    Reader,
    load_strictly,
    read_tensors,
    ready,
)

PROMPTS_AT_ONCE = 64

Embeddings = Float[Tensor, "item channel"]
Preprocess = Callable[[Picture, int], Float[Tensor, "rgb height width"]]


class Pictures:
    """Unit embeddings of pictures by a CLIP with a vision tower."""

    def __init__(
        self, model: Any, device: torch.device, preprocess: Preprocess = clip_input
    ) -> None:
        self.model: Any = ready(model, device)
        self.device, self.preprocess = device, preprocess
        vision = getattr(model.config, "vision_config", model.config)
        self.size: int = vision.image_size

    @torch.inference_mode()
    def embed(self, images: Sequence[Picture]) -> Embeddings:
        """One row an image, of length 1."""
        pixels = torch.stack([self.preprocess(image, self.size) for image in images])
        pixels = pixels.to(self.device)
        if isinstance(self.model, CLIPVisionModelWithProjection):
            return unit(self.model(pixel_values=pixels).image_embeds)
        return unit(features(self.model.get_image_features(pixel_values=pixels)))


class Prompts:
    """Unit embeddings of prompts; each distinct one goes through the network once."""

    def __init__(
        self,
        model: Any,
        tokenizer: CLIPTokenizer,
        device: torch.device,
        clean: Callable[[str], str] = lambda prompt: prompt,
    ) -> None:
        self.model, self.tokenizer, self.device, self.clean = model, tokenizer, device, clean
        self.length: int = model.config.text_config.max_position_embeddings
        self.known: dict[str, Tensor] = {}

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Word numbers, cut after the text's length with the end mark kept, padded to it."""
        return self.tokenizer(
            [self.clean(prompt) for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        ).input_ids

    @torch.inference_mode()
    def embed(self, prompts: Sequence[str]) -> Embeddings:
        """One row a prompt, of length 1."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        for start in range(0, len(new), PROMPTS_AT_ONCE):
            part = new[start : start + PROMPTS_AT_ONCE]
            tokens = self.tokens(part).to(self.device)
            rows = unit(features(self.model.get_text_features(input_ids=tokens)))
            self.known.update(zip(part, rows, strict=True))
        return torch.stack([self.known[prompt] for prompt in prompts])


def features(output: Any) -> Tensor:
    """The projected embedding; transformers returns it bare before version 5, in a record since."""
    return output if isinstance(output, Tensor) else output.pooler_output


def unit(rows: Embeddings) -> Embeddings:
    """The rows, each divided by its length."""
    return rows / rows.norm(dim=-1, keepdim=True)


def cosines(images: Embeddings, prompts: Embeddings) -> Float[Tensor, " item"]:
    """Cosine of each image with its prompt."""
    return (images * prompts).sum(dim=-1)


def read_tokenizer(source: str, published: Published) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer from a folder or hub id; every CLIP here has the same words."""
    vocabulary = published.beside(source, "vocab.json")
    merges = published.beside(source, "merges.txt")
    return CLIPTokenizer(vocab=str(vocabulary), merges=str(merges))


def read_clip(
    source: str, published: Published, *, has_text: bool, read: Reader = read_tensors
) -> tuple[Any, Path]:
    """A CLIP in transformers' layout from a folder or hub id, and the file of its weights."""
    config = CLIPConfig.from_pretrained(str(published.beside(source, "config.json").parent))
    path = published.find(source, MODEL_FILES)
    with torch.device("meta"):
        if has_text:
            model: Any = CLIPModel(config)
        else:
            config.vision_config.projection_dim = config.projection_dim
            model = CLIPVisionModelWithProjection(config.vision_config)
    text = () if has_text else ("text_model.*", "text_projection.weight", "logit_scale")
    load_strictly(model, read(path), path, unused=("*.position_ids", *text))
    return model, path
