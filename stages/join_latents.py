"""Shards of latents in; one table of them out, in the order of the pairs or likes that they belong to.

Example: paste the line from logs/<run>/seed/join_latents.log
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from stages.core.artifacts.joins import ENCODED_AT_ONCE, batches_in_turn
from stages.core.artifacts.schemas import LIKE_LATENTS, PAIR_LATENTS
from stages.core.artifacts.tables import holds, writing_table
from stages.core.execution.runtime import run_stage, stage


@dataclass(frozen=True, kw_only=True)
class Args:
    """Shards of latents in, one table out."""

    shards: tuple[Path, ...]
    """What encode_preferences wrote, from shard 0 on (schema pair_latents or like_latents)."""
    output: Path
    """Where the table goes (the same schema)."""
    batch: int = ENCODED_AT_ONCE
    """Rows that were encoded at a time."""


def main(args: Args) -> None:
    """Write the shards' batches in turn."""
    with stage("join_latents") as run:
        schema = LIKE_LATENTS if holds(args.shards[0], LIKE_LATENTS) else PAIR_LATENTS
        with writing_table(
            args.output, schema, stage="join_latents", arguments=args, inputs=args.shards
        ) as writer:
            for rows in batches_in_turn(args.shards, schema, size=args.batch):
                writer.write(rows)
        run.rows_in = run.rows_out = writer.num_rows


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
