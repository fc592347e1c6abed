"""Shards of latents in; one table of them out, in the order of the pairs or likes that they belong to.

Example: paste the line from logs/<run>/seed/join_latents.log
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import tyro

from stages.core.artifacts.joins import (
    ENCODED_AT_ONCE,
    batches_in_turn,
    refuse_other_images,
    refuse_other_pairs,
)
from stages.core.artifacts.schemas import LIKE_LATENTS, LIKES, PAIR_LATENTS, PREFERENCES
from stages.core.artifacts.tables import holds, read_batches, writing_table
from stages.core.execution.runtime import run_stage, stage


@dataclass(frozen=True, kw_only=True)
class Args:
    """Shards of latents in, one table out."""

    preferences: Path
    """The pairs or likes that they belong to (schema preferences, liked_pairs or likes)."""
    shards: tuple[Path, ...]
    """What encode_preferences wrote, from shard 0 on (schema pair_latents or like_latents)."""
    output: Path
    """Where the table goes (the same schema)."""
    batch: int = ENCODED_AT_ONCE
    """Rows that were encoded at a time."""


def main(args: Args) -> None:
    """Write the shards' batches in turn; each must be of the rows that are at its place."""
    with stage("join_latents") as run:
        are_likes = holds(args.preferences, LIKES)
        given, made = (LIKES, LIKE_LATENTS) if are_likes else (PREFERENCES, PAIR_LATENTS)
        key, refuse = (
            ("image_id", refuse_other_images) if are_likes else ("pair_id", refuse_other_pairs)
        )
        rows = read_batches(args.preferences, given, [key], size=args.batch)
        encoded = batches_in_turn(args.shards, made, size=args.batch)
        inputs = [args.preferences, *args.shards]
        with writing_table(
            args.output, made, stage="join_latents", arguments=args, inputs=inputs
        ) as writer:
            nothing = made.arrow.empty_table()
            for expected, latents in zip_longest(rows, encoded, fillvalue=nothing):
                refuse(expected, latents, args.output)
                writer.write(latents)
        run.rows_in = run.rows_out = writer.num_rows


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
