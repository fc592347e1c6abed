"""CLIPScore (Hessel et al. 2021): how well a picture fits its prompt, by OpenAI's CLIP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float

from stages.metrics.clip import Pictures, Prompts, cosines, read_clip, read_tokenizer
from stages.metrics.preprocessing import Picture
from stages.metrics.weights import Published, read_options, spec_of

ADDRESS = "https://huggingface.co/openai/clip-vit-large-patch14"


class ClipScore:
    """100 max(cosine, 0), torchmetrics' scale; the paper's own is 2.5 max(cosine, 0)."""

    def __init__(self, options: Mapping[str, str], device: torch.device) -> None:
        given = {"tokenizer": options.get("weights", ""), **options}
        values = read_options("clipscore", given, {"weights": None, "tokenizer": None}, ADDRESS)
        published = Published(metric="clipscore", option="weights", address=ADDRESS)
        words = Published(metric="clipscore", option="tokenizer", address=ADDRESS)
        model, path = read_clip(values["weights"], published, has_text=True)
        self.pictures = Pictures(model, device)
        self.prompts = Prompts(model, read_tokenizer(values["tokenizer"], words), device)
        self.spec = spec_of("clipscore", values, {path.name: path}, "100*max(cos, 0)")

    def __call__(
        self, *, images: Sequence[Picture], prompts: Sequence[str]
    ) -> Float[np.ndarray, " image"]:
        """The score of each image."""
        rows = cosines(self.pictures.embed(images), self.prompts.embed(prompts))
        return (100 * rows.clamp(min=0)).float().cpu().numpy()
