"""Preference pairs as a model reads them: latents of the images, conditioning of the captions."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stages.core.artifacts.images import decode_image, to_model_input
from stages.core.artifacts.tensor_files import TensorFile
from stages.core.errors import UserError
from stages.core.method.listwise import Lists
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
    lists: Lists | None = None
    """Which pairs make one ranked list, for the listwise loss; None trains on each pair alone."""
    loser_caption: Int[Tensor, " pair"] | None = None
    """Row of `text` of each loser, where likes are put side by side; None: both images have one caption."""
    files: tuple[TensorFile, ...] = ()
    """Where latents and conditionings are mapped from, if they are not in memory."""

    def __len__(self) -> int:
        return len(self.winner)

    @property
    def num_items(self) -> int:
        """What a training takes in turn: pairs, or lists of them."""
        return len(self) if self.lists is None else len(self.lists.rows)

    @property
    def latents_shape(self) -> tuple[int, ...]:
        """The shape of one image's latents."""
        return tuple(self.winner.shape[1:])

    def let_go(self) -> None:
        """Give back the memory of the rows read so far. ArtifactError if a file has been cut short."""
        for file in self.files:
            file.let_go()


@dataclass(frozen=True)
class EncodedLikes:
    """Liked and disliked images ready for training, each by itself."""

    latents: Float[Tensor, "image ..."]
    is_liked: Bool[Tensor, " image"]
    caption: Int[Tensor, " image"]
    """Row of `text`."""
    text: Conditioning
    """Conditioning of each different caption; the last row is the empty caption's."""
    geometry: Int[Tensor, "image six"]
    """Original height and width, top and left of the crop, target height and width, in pixels."""
    files: tuple[TensorFile, ...] = ()
    """Where latents and conditionings are mapped from, if they are not in memory."""

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def num_items(self) -> int:
        """What a training takes in turn: images."""
        return len(self)

    @property
    def latents_shape(self) -> tuple[int, ...]:
        """The shape of one image's latents."""
        return tuple(self.latents.shape[1:])

    @property
    def share_liked(self) -> float:
        """Which share of all images were liked."""
        return float(self.is_liked.double().mean())

    def let_go(self) -> None:
        """Give back the memory of the rows read so far. ArtifactError if a file has been cut short."""
        for file in self.files:
            file.let_go()


def geometries(column: pa.ChunkedArray) -> Int[Tensor, "row six"]:
    """The sizes and crops in a column."""
    return torch.tensor(column.to_pylist(), dtype=torch.int64).reshape(-1, 6)


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
    parts = list(encoded_parts(model, captions))
    names = parts[0].tensors
    return Conditioning({name: torch.cat([part[name] for part in parts]) for name in names})


def encoded_parts(model: DiffusionModel, captions: Sequence[str]) -> Iterator[Conditioning]:
    """As `encode_captions`, some captions after the others."""
    truncated = model.num_truncated(captions)
    if truncated:
        log.warning(
            "%d of %d captions are longer than the text encoder reads and are cut",
            truncated,
            len(captions),
        )
    cpu = torch.device("cpu")
    for start in range(0, len(captions), CAPTIONS_PER_BATCH):
        yield model.encode_text(captions[start : start + CAPTIONS_PER_BATCH]).to(cpu)


def encode_stored_images(
    model: DiffusionModel, column: pa.ChunkedArray
) -> Float[Tensor, "row ..."]:
    """Latents of the images of a column, in float32 on the CPU; all of them go at once."""
    images = [decode_image(image["bytes"]) for image in column.to_pylist()]
    pixels = torch.from_numpy(to_model_input(images, model.image_size))
    return model.encode_images(pixels).float().cpu()
