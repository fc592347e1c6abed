"""LAION's aesthetics predictor v2: a linear head on CLIP ViT-L/14; it knows no prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from stages.core.errors import UserError
from stages.metrics.clip import Pictures, read_clip
from stages.metrics.heads import Head
from stages.metrics.preprocessing import Picture
from stages.metrics.weights import (
    Published,
    Reader,
    load_strictly,
    read_options,
    read_tensors,
    ready,
    shape_of,
    spec_of,
)

FILE = "sac+logos+ava1-l14-linearMSE.pth"
ADDRESS = "https://github.com/christophschuhmann/improved-aesthetic-predictor"
CLIP = "openai/clip-vit-large-patch14"


def read_head(path: Path, read: Reader = read_tensors) -> Head:
    """The published head."""
    tensors = read(path)
    with torch.device("meta"):
        head = Head(shape_of(tensors, "layers.0.weight", path)[-1])
    load_strictly(head, tensors, path)
    return head


class Aesthetics:
    """The rating of each picture, about 1 to 10; Stable Diffusion's lie between 5 and 6."""

    def __init__(self, options: Mapping[str, str], device: torch.device) -> None:
        values = read_options("aesthetics", options, {"weights": None, "clip": CLIP}, ADDRESS)
        published = Published(metric="aesthetics", option="weights", address=ADDRESS)
        tower = Published(
            metric="aesthetics", option="clip", address=f"https://huggingface.co/{CLIP}"
        )
        path = published.find(values["weights"], [FILE])
        head = read_head(path)
        model, clip_path = read_clip(values["clip"], tower, has_text=False)
        if head.layers[0].in_features != model.config.projection_dim:
            raise UserError(
                f"{path} rates embeddings of {head.layers[0].in_features} numbers, but "
                f"{clip_path} gives {model.config.projection_dim}; metrics.aesthetics.clip must be "
                f"{CLIP}"
            )
        self.head = ready(head, device)
        self.pictures = Pictures(model, device)
        files = {path.name: path, f"clip/{clip_path.name}": clip_path}
        self.spec = spec_of("aesthetics", values, files, "head(unit embedding)")

    @torch.inference_mode()
    def __call__(
        self, *, images: Sequence[Picture], prompts: Sequence[str]
    ) -> Float[np.ndarray, " image"]:
        """The rating of each image."""
        embeddings = self.pictures.embed(images)  # of length 1; others would be rated 20 to 30
        return self.head(embeddings).float().cpu().numpy()
