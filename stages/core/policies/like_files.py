"""Single likes of a training: from tables to what a training maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from stages.core.artifacts.joins import refuse_other_images
from stages.core.artifacts.schemas import LIKE_LATENTS, LIKES
from stages.core.artifacts.tables import read_batches, read_table
from stages.core.artifacts.tensor_files import TensorFile
from stages.core.models.adapter import DiffusionModel
from stages.core.models.conditioning import Conditioning
from stages.core.policies.encoding import (
    IMAGES_PER_BATCH,
    EncodedLikes,
    encode_stored_images,
    geometries,
    latents_tensor,
)


@dataclass(frozen=True, kw_only=True)
class LikeTables:
    """Single likes as tables hold them. What is small is read; latents and images are read a few at a time."""

    prompts: Sequence[str]
    is_liked: Bool[Tensor, " image"]
    geometry: Int[Tensor, "image six"]
    """Original height and width, top and left of the crop, target height and width, in pixels."""
    latents: Path
    """The table of the latents (schema like_latents)."""
    images: Path | None = None
    """The table of the images (schema likes), to encode them again instead of reading their latents."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def captions(self) -> list[str]:
        """Each caption once, in order."""
        return sorted(set(self.prompts))

    def encoded(self, model: DiffusionModel) -> Iterator[dict[str, Tensor]]:
        """Latents in float32, a few images at a time."""
        path, schema, name = (
            (self.images, LIKES, "image")
            if self.images
            else (self.latents, LIKE_LATENTS, "latents")
        )
        for batch in read_batches(path, schema, [name], size=IMAGES_PER_BATCH):
            column = batch.column(name)
            yield {
                "image": encode_stored_images(model, column)
                if self.images
                else latents_tensor(column, model.latents_shape, str(path))
            }

    def opened(self, captions: TensorFile, latents: TensorFile) -> EncodedLikes:
        """The likes as a training reads them, from the files of their captions and latents."""
        row_of = {prompt: row for row, prompt in enumerate(self.captions)}
        return EncodedLikes(
            latents=latents.tensors["image"],
            is_liked=self.is_liked,
            caption=torch.tensor([row_of[prompt] for prompt in self.prompts]),
            text=Conditioning(captions.tensors),
            geometry=self.geometry,
            files=(captions, latents),
        )


def human_likes(likes: Path, latents: Path, *, is_live: bool = False) -> LikeTables:
    """Human likes and their latents. UserError unless both list the same images."""
    table = read_table(likes, LIKES, ["image_id", "prompt", "is_liked"])
    encoded = read_table(latents, LIKE_LATENTS, ["image_id", "geometry"])
    refuse_other_images(table, encoded, latents)
    return LikeTables(
        prompts=table.column("prompt").to_pylist(),
        is_liked=torch.tensor(table.column("is_liked").to_pylist(), dtype=torch.bool),
        geometry=geometries(encoded.column("geometry")),
        latents=latents,
        images=likes if is_live else None,
    )
