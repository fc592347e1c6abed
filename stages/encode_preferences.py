r"""Imported preference pairs in; the VAE latents of their images out, so that training needs no VAE.

Example:
    python -m stages.encode_preferences --preferences preferences.parquet \\
        --model.base stages/shapes/pipeline --model.dtype float32 --output latents.parquet
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from stages.core.artifacts import read_table, write_table
from stages.core.images import decode_image, geometry, to_model_input
from stages.core.models import ModelSettings, load_model
from stages.core.runtime import choose_device, progress, run_stage, stage
from stages.core.schemas import PAIR_LATENTS, PREFERENCES


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


def main(args: Args) -> None:
    """Encode winner and loser of every pair."""
    with stage("encode_preferences") as run:
        table = read_table(args.preferences, PREFERENCES, ["pair_id", "winner", "loser"])
        pairs = table.to_pylist()
        model = load_model(args.model, device=choose_device(args.threads))
        rows = []
        starts = range(0, len(pairs), args.batch)
        for start in progress(starts, "encoding", "pairs", args.batch):
            part = pairs[start : start + args.batch]
            images = [decode_image(pair[side]["bytes"]) for side in ("winner", "loser")
                      for pair in part]  # fmt: skip
            pixels = torch.from_numpy(to_model_input(images, model.image_size))
            latents = model.encode_images(pixels)
            flat = latents.float().cpu().flatten(start_dim=1).numpy()
            sizes = [geometry(image, model.image_size) for image in images]
            for row, pair in enumerate(part):
                rows.append(
                    {
                        "pair_id": pair["pair_id"],
                        "winner_latents": flat[row],
                        "loser_latents": flat[len(part) + row],
                        "winner_geometry": sizes[row],
                        "loser_geometry": sizes[len(part) + row],
                    }
                )
        write_table(
            args.output, rows, PAIR_LATENTS,
            stage="encode_preferences", arguments=args, inputs=[args.preferences],
        )  # fmt: skip
        run.rows_in, run.rows_out = len(pairs), len(rows)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
