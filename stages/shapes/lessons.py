"""What the embedded world's pipelines are trained on: drawings, their latents, their captions, its words."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from jaxtyping import Float
from tokenizers import CharBPETokenizer
from torch import Tensor
from transformers import CLIPTokenizer

from stages.shapes.captions import CAN_BE_UNSAID, all_captions, all_scenes
from stages.shapes.renderer import draw, web_like

log = logging.getLogger("lessons")


def build_tokenizer(folder: Path, max_tokens: int) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair vocabulary was learnt from the captions, and is kept in the folder.

    Learnt again, single letters at a word's end have their numbers in another order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    special = ["<|startoftext|>", "<|endoftext|>"]
    if not (folder / "merges.txt").exists():
        learner = CharBPETokenizer(suffix="</w>", unk_token="<|endoftext|>", lowercase=True)
        learner.train_from_iterator(
            [str(caption) for caption in all_captions()],
            vocab_size=400,
            min_frequency=1,
            special_tokens=special,
            suffix="</w>",
            show_progress=False,
        )
        learner.save_model(str(folder))
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        unk_token=special[1],
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[1],
        model_max_length=max_tokens,
    )


@torch.no_grad()
def encode_pictures(
    vae: AutoencoderKL, num_pictures: int, *, seed: int, folder: Path
) -> Float[Tensor, "picture channel height width"]:
    """Latents of freshly drawn pictures: of every scene in turn, over and over. Kept in the folder."""
    path = folder / f"latents-{num_pictures}.pt"
    scenes = all_scenes()
    picked = [scenes[i % len(scenes)] for i in range(num_pictures)]
    if path.exists():
        latents = torch.load(path, weights_only=True)
    else:
        rng = np.random.default_rng((seed, 2))
        parts = []
        for start in range(0, num_pictures, 64):
            images = as_tensor(draw([web_like(s, rng) for s in picked[start : start + 64]]))
            parts.append(vae.encode(images.to(vae.device)).latent_dist.mode().cpu())
            if start % 6400 == 0:
                log.info("encoded %d of %d pictures", start, num_pictures)
        latents = torch.cat(parts)
        torch.save(latents, path)
    return latents


def captions_of_scenes() -> list[list[str]]:
    """Each scene's eight captions: bit n of the place is whether the n-th of `CAN_BE_UNSAID` is."""
    return [
        [
            str(scene.caption(unsaid=[w for n, w in enumerate(CAN_BE_UNSAID) if which >> n & 1]))
            for which in range(2 ** len(CAN_BE_UNSAID))
        ]
        for scene in all_scenes()
    ]


def as_tensor(images: np.ndarray) -> Float[Tensor, "image rgb height width"]:
    """Pictures in [0, 1] as the VAE takes them: channels first, in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() * 2 - 1
