r"""Imported preference pairs in; the VAE latents of their images out, so that training needs no VAE.

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
from stages.core.artifacts.schemas import PAIR_LATENTS, PREFERENCES
from stages.core.artifacts.tables import num_rows, read_batches, writing_table
from stages.core.execution.ahead import ahead, threads_beside
from stages.core.execution.runtime import choose_device, progress, run_stage, stage
from stages.core.models.adapter import DiffusionModel
from stages.core.models.families import load_model
from stages.core.models.loading import ModelSettings


@dataclass(frozen=True, kw_only=True)
class Args:
    """Preference pairs in, the VAE latents of their images out."""

    preferences: Path
    """Pairs with images (schema preferences)."""
    model: ModelSettings
    """The pretrained model."""
    output: Path
    """Where the latents go (schema pair_latents)."""
    batch: int = 16
    """Pairs encoded at a time."""
    threads: int = 1
    """CPU threads."""
    jobs_per_gpu: int = 1
    """Jobs of this kind that may share a GPU; 1 has it alone."""


def main(args: Args) -> None:
    """Encode winner and loser of every pair."""
    with stage("encode_preferences") as run:
        count = num_rows(args.preferences)
        batches = read_batches(
            args.preferences, PREFERENCES, ["pair_id", "winner", "loser"], size=args.batch
        )
        model = load_model(args.model, device=choose_device(args.threads, args.jobs_per_gpu))
        with writing_table(
            args.output, PAIR_LATENTS,
            stage="encode_preferences", arguments=args, inputs=[args.preferences],
        ) as writer:  # fmt: skip
            prepared = ahead(
                partial(prepare, size=model.image_size, source=args.preferences),
                (batch.to_pylist() for batch in batches),
                threads_beside(model.device.type),
            )
            starts = range(0, count, args.batch)
            for _start in progress(starts, "encoding", "pairs", args.batch):
                writer.write(encode(model, next(prepared)))
        run.rows_in, run.rows_out = count, writer.num_rows


@dataclass(frozen=True)
class Prepared:
    """A batch of pairs as the VAE takes them: all winners, then all losers."""

    pair_ids: list[str]
    pixels: torch.Tensor
    geometry: list[list[int]]


def prepare(pairs: Sequence[Mapping[str, Any]], *, size: Size, source: Path) -> Prepared:
    """Decode and fit the images of some rows of a preferences table, which is named in errors."""
    images = [
        decode_image(pair[side]["bytes"], f"{source}, pair {pair['pair_id']}, the {side}")
        for side in ("winner", "loser")
        for pair in pairs
    ]
    return Prepared(
        [pair["pair_id"] for pair in pairs],
        torch.from_numpy(to_model_input(images, size)),
        [geometry(image, size) for image in images],
    )


def encode(model: DiffusionModel, batch: Prepared) -> list[dict[str, object]]:
    """Rows of a latents table."""
    flat = model.encode_images(batch.pixels).float().cpu().flatten(start_dim=1).numpy()
    count, sizes = len(batch.pair_ids), batch.geometry
    return [
        {
            "pair_id": name,
            "winner_latents": flat[row],
            "loser_latents": flat[count + row],
            "winner_geometry": sizes[row],
            "loser_geometry": sizes[count + row],
        }
        for row, name in enumerate(batch.pair_ids)
    ]


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
