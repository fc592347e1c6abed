r"""Imported preference pairs, or single likes, in; the VAE latents of their images out, so that training needs no VAE.

Example:
    python -m stages.encode_preferences --preferences preferences.parquet \\
        --model.base stages/shapes/pipeline --model.dtype float32 --output latents.parquet
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro

from stages.core.artifacts.images import Size, decode_image, geometry, to_model_input
from stages.core.artifacts.joins import ENCODED_AT_ONCE
from stages.core.artifacts.schemas import LIKE_LATENTS, LIKES, PAIR_LATENTS, PREFERENCES, Schema
from stages.core.artifacts.tables import holds, num_rows, read_batches, writing_table
from stages.core.execution.ahead import ahead, threads_beside
from stages.core.execution.runtime import choose_device, progress, run_stage, stage
from stages.core.models.adapter import DiffusionModel
from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings
from stages.core.policies.generation import shard_of


@dataclass(frozen=True, kw_only=True)
class Args:
    """Preference pairs, or single likes, in; the VAE latents of their images out."""

    preferences: Path
    """Pairs with images (schema preferences or liked_pairs), or likes (schema likes)."""
    model: ModelSettings
    """The pretrained model."""
    output: Path
    """Where the latents go (schema pair_latents; of likes: like_latents)."""
    batch: int = ENCODED_AT_ONCE
    """Pairs (or likes) encoded at a time."""
    shard: int = 0
    """Which of the jobs that share the rows this one is, from 0."""
    num_shards: int = 1
    """How many share them. join_latents makes one table of what they write."""
    threads: int = 1
    """CPU threads."""
    jobs_per_gpu: int = 1
    """Jobs of this kind that may share a GPU; 1 has it alone."""


def main(args: Args) -> None:
    """Encode winner and loser of every pair, or the image of every like."""
    with stage("encode_preferences") as run:
        places = range(num_rows(args.preferences))
        rows = shard_of(places, args.shard, args.num_shards, args.batch)
        kind = OF_LIKES if holds(args.preferences, LIKES) else OF_PAIRS
        batches = read_batches(
            args.preferences, kind.given, [kind.name, *kind.sides], size=args.batch, rows=rows
        )
        model = load_model(args.model, device=choose_device(args.threads, args.jobs_per_gpu))
        with writing_table(
            args.output, kind.made,
            stage="encode_preferences", arguments=args, inputs=[args.preferences],
        ) as writer:  # fmt: skip
            prepared = ahead(
                partial(prepare, kind=kind, size=model.image_size, source=args.preferences),
                (batch.to_pylist() for batch in batches),
                threads_beside(model.device.type),
            )
            starts = range(0, len(rows), args.batch)
            for _start in progress(starts, "encoding", kind.words, args.batch):
                writer.write(encode(model, next(prepared)))
        run.rows_in, run.rows_out = len(rows), writer.num_rows


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a table holds, and which columns its latents have."""

    given: Schema
    made: Schema
    word: str
    name: str
    """The column that names a row."""
    sides: tuple[str, ...]
    """The columns of its images."""
    latents: tuple[str, ...]
    geometries: tuple[str, ...]

    @property
    def words(self) -> str:
        """Several of them."""
        return f"{self.word}s"


OF_PAIRS = Kind(
    given=PREFERENCES,
    made=PAIR_LATENTS,
    word="pair",
    name="pair_id",
    sides=("winner", "loser"),
    latents=("winner_latents", "loser_latents"),
    geometries=("winner_geometry", "loser_geometry"),
)
OF_LIKES = Kind(
    given=LIKES,
    made=LIKE_LATENTS,
    word="like",
    name="image_id",
    sides=("image",),
    latents=("latents",),
    geometries=("geometry",),
)


@dataclass(frozen=True)
class Prepared:
    """A batch of rows as the VAE takes them: of pairs all winners, then all losers."""

    kind: Kind
    names: list[str]
    pixels: torch.Tensor
    geometry: list[list[int]]


def prepare(rows: Sequence[Mapping[str, Any]], *, kind: Kind, size: Size, source: Path) -> Prepared:
    """Decode and fit the images of some rows of a table, which is named in errors."""
    images = [
        decode_image(row[side]["bytes"], f"{source}, {kind.word} {row[kind.name]}, the {side}")
        for side in kind.sides
        for row in rows
    ]
    return Prepared(
        kind,
        [row[kind.name] for row in rows],
        torch.from_numpy(to_model_input(images, size)),
        [geometry(image, size) for image in images],
    )


def encode(model: DiffusionModel, batch: Prepared) -> list[dict[str, object]]:
    """Rows of a latents table."""
    flat = model.encode_images(batch.pixels).float().cpu().flatten(start_dim=1).numpy()
    count, sizes, kind = len(batch.names), batch.geometry, batch.kind
    return [
        {kind.name: name}
        | {
            column: values[count * place + row]
            for values, columns in ((flat, kind.latents), (sizes, kind.geometries))
            for place, column in enumerate(columns)
        }
        for row, name in enumerate(batch.names)
    ]


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
