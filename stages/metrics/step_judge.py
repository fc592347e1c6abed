"""A CLIP as a step-aware preference model that can be trained: the network, and how it is shown images and prompts."""

from __future__ import annotations

import torch

from stages.core.models.denoiser import Denoiser
from stages.core.training.step_judge.settings import TrainableJudge
from stages.metrics.clip import Prompts, read_tokenizer
from stages.metrics.step_aware import (
    TOKENIZER,
    begin_step_aware,
    save_step_aware,
    step_aware_input,
)
from stages.metrics.weights import Published

PICKSCORE = "https://huggingface.co/yuvalkirstain/PickScore_v1"


def published(option: str) -> Published:
    """What an option of step_judge names, for messages."""
    address = f"https://huggingface.co/{TOKENIZER}" if option == "tokenizer" else PICKSCORE
    return Published(metric="step_judge", option=option, address=address, block="")


def load_judge(clip: str, tokenizer: str, *, seed: int, device: torch.device) -> TrainableJudge:
    """The network as it begins: the CLIP, whatever the timestep. UserError where its files are missing or do not fit.

    `seed` decides the weights that are new.
    """
    network, _ = begin_step_aware(clip, published("clip"), seed)
    words = read_tokenizer(tokenizer, published("tokenizer"))
    network = network.float().to(device)
    size = network.model.config.vision_config.image_size
    return TrainableJudge(
        network=Denoiser(network),
        see=lambda images: step_aware_input(images, size),
        read=Prompts(network.model, words, device).tokens,
        save=lambda folder: save_step_aware(network, folder),
    )
