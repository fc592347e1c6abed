"""PickScore (Kirstain et al. 2023): a CLIP ViT-H/14 fine-tuned on Pick-a-Pic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float

from stages.metrics.clip import Pictures, Prompts, cosines, read_clip, read_tokenizer
from stages.metrics.preprocessing import Picture
from stages.metrics.weights import Published, read_options, spec_of

ADDRESS = "https://huggingface.co/yuvalkirstain/PickScore_v1"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Where the published example takes its processor from."""


class PickScore:
    """exp(logit_scale) times the cosine of picture and prompt; about 20 to 23."""

    def __init__(self, options: Mapping[str, str], device: torch.device) -> None:
        defaults = {"weights": None, "tokenizer": TOKENIZER}
        values = read_options("pickscore", options, defaults, ADDRESS)
        published = Published(metric="pickscore", option="weights", address=ADDRESS)
        words = Published(
            metric="pickscore", option="tokenizer", address=f"https://huggingface.co/{TOKENIZER}"
        )
        model, path = read_clip(values["weights"], published, has_text=True)
        self.scale = model.logit_scale.exp().item()
        self.pictures = Pictures(model, device)
        self.prompts = Prompts(model, read_tokenizer(values["tokenizer"], words), device)
        scale = f"exp(logit_scale)*cos, exp(logit_scale) = {self.scale:.6g}"
        self.spec = spec_of("pickscore", values, {path.name: path}, scale)

    def __call__(
        self, *, images: Sequence[Picture], prompts: Sequence[str]
    ) -> Float[np.ndarray, " image"]:
        """The score of each image."""
        rows = cosines(self.pictures.embed(images), self.prompts.embed(prompts))
        return (self.scale * rows).float().cpu().numpy()
