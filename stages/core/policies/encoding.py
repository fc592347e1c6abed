"""Preference pairs as a model reads them: latents of the images, conditioning of the captions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stages.core.artifacts.images import decode_image, to_model_input
from stages.core.errors import UserError
from stages.core.models.adapter import DiffusionModel
from stages.core.models.conditioning import Conditioning

log = logging.getLogger(__name__)

CAPTIONS_PER_BATCH = 64
IMAGES_PER_BATCH = 8


@dataclass(frozen=True)
class EncodedPairs:
    """Preference pairs ready for training: latents, and which caption each pair has."""

    winner: Float[Tensor, "pair ..."]
    loser: Float[Tensor, "pair ..."]
    caption: Int[Tensor, " pair"]
    """Row of `text`."""
    text: Conditioning
    """Conditioning of each different caption; the last row is the empty caption's."""
    winner_geometry: Int[Tensor, "pair six"]
    """Original height and width, top and left of the crop, target height and width, in pixels."""
    loser_geometry: Int[Tensor, "pair six"]
    """The loser's."""
    probability: Float[Tensor, " pair"] | None = None
    """That the winner is preferred, for soft labels; None takes every label as certain."""

    def __len__(self) -> int:
        return len(self.winner)


def latents_tensor(
    column: pa.ChunkedArray, shape: tuple[int, ...], where: str
) -> Float[Tensor, "row ..."]:
    """The latents in a column. UserError if they are not finite, or not of this model's shape."""
    parts = [np.asarray(chunk.flatten(), dtype=np.float32) for chunk in column.chunks]
    flat = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if len(flat) != len(column) * int(np.prod(shape)):
        raise UserError(
            f"{where}: latents of {len(column)} images have {len(flat)} values, expected {shape} "
            "each; they were made with another base model. Make the file anew."
        )
    if not np.isfinite(flat).all():
        raise UserError(
            f"{where}: {int((~np.isfinite(flat)).sum())} values of the latents are not finite; the model "
            "that made them overflowed in its model.dtype. Make the file anew in another precision."
        )
    return torch.from_numpy(flat).reshape(len(column), *shape)


def encode_captions(model: DiffusionModel, captions: Sequence[str]) -> Conditioning:
    """Conditioning of each caption, on the CPU; says how many are cut to the encoder's length."""
    truncated = model.num_truncated(captions)
    if truncated:
        log.warning(
            "%d of %d captions are longer than the text encoder reads and are cut",
            truncated,
            len(captions),
        )
    cpu = torch.device("cpu")
    parts = [
        model.encode_text(captions[start : start + CAPTIONS_PER_BATCH]).to(cpu)
        for start in range(0, len(captions), CAPTIONS_PER_BATCH)
    ]
    whole = parts[0]
    names = whole.tensors
    return Conditioning({name: torch.cat([part[name] for part in parts]) for name in names})


def encode_pairs(
    model: DiffusionModel, table: pa.Table, where: str, *, is_live: bool = False
) -> EncodedPairs:
    """Latents and caption conditionings of a table with prompt, geometry and latents columns.

    Live encoding takes the images instead of the latents. Neither VAE nor text encoder is kept.
    """
    prompts: list[str] = table.column("prompt").to_pylist()
    different = sorted(set(prompts))
    row_of = {prompt: row for row, prompt in enumerate(different)}
    text = encode_captions(model, [*different, ""])
    sides = {
        side: _encode_live(model, table.column(side))
        if is_live
        else latents_tensor(table.column(f"{side}_latents"), model.latents_shape, where)
        for side in ("winner", "loser")
    }
    model.release("vae", *model.encoder_parts)
    return EncodedPairs(
        winner=sides["winner"],
        loser=sides["loser"],
        caption=torch.tensor([row_of[prompt] for prompt in prompts]),
        text=text,
        winner_geometry=_geometry(table.column("winner_geometry")),
        loser_geometry=_geometry(table.column("loser_geometry")),
    )


def _geometry(column: pa.ChunkedArray) -> Int[Tensor, "row six"]:
    return torch.tensor(column.to_pylist(), dtype=torch.int64).reshape(-1, 6)


def _encode_live(model: DiffusionModel, column: pa.ChunkedArray) -> Float[Tensor, "row ..."]:
    parts = []
    for start in range(0, len(column), IMAGES_PER_BATCH):
        data = column.slice(start, IMAGES_PER_BATCH).to_pylist()
        images = [decode_image(image["bytes"]) for image in data]
        pixels = torch.from_numpy(to_model_input(images, model.image_size))
        parts.append(model.encode_images(pixels).float().cpu())
    return torch.cat(parts)
