"""Generated pairs and human pairs in; the mix to train on out. Paper: SAIL Sec. 4.2, Alg. 1.

Example: paste the line from logs/<run>/iter01/mix_preferences.log
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from stages.core.artifacts.joins import joined_batches
from stages.core.artifacts.schemas import TRAINING_PAIRS
from stages.core.artifacts.tables import num_rows, read_batches, writing_table
from stages.core.execution.runtime import log, run_stage, stage
from stages.core.method.mixing import choose_without_replacement, num_human_pairs
from stages.core.method.seeding import seed_of

PAIRS_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Args:
    """Generated pairs and human pairs in, the mix to train on out."""

    pairs: Path
    """This iteration's generated pairs (schema training_pairs); all are kept."""
    preferences: Path
    """Human pairs (schema preferences)."""
    latents: Path
    """Latents of the human pairs (schema pair_latents)."""
    seed_fraction: float
    """Share of human pairs in the mix (paper: 0.25); 0 is the ablation without mixup."""
    seed: int
    """Run seed: decides, with the iteration, which human pairs join."""
    iteration: int
    """Number of this iteration, from 1."""
    output: Path
    """Where the mix goes (schema training_pairs)."""


def main(args: Args) -> None:
    """Keep all generated pairs, and draw human pairs without replacement."""
    with stage("mix_preferences") as run:
        num_generated, num_available = num_rows(args.pairs), num_rows(args.preferences)
        wanted = num_human_pairs(num_generated, args.seed_fraction)
        if wanted > num_available:
            log.warning(
                "mix_preferences: %d human pairs would make a share of %.2f, there are %d; "
                "all are used", wanted, args.seed_fraction, num_available,
            )  # fmt: skip
        seed = seed_of(args.seed, "mix_preferences", args.iteration)
        rows = choose_without_replacement(num_available, wanted, seed).tolist()
        with writing_table(
            args.output, TRAINING_PAIRS, stage="mix_preferences", arguments=args,
            inputs=[args.pairs, args.preferences, args.latents],
        ) as writer:  # fmt: skip
            for batch in read_batches(args.pairs, TRAINING_PAIRS, size=PAIRS_AT_ONCE):
                writer.write(batch)
            for batch in joined_batches(args.preferences, args.latents, rows, size=PAIRS_AT_ONCE):
                writer.write(batch)
        log.info(
            "mix_preferences: %d generated and %d human pairs, a human share of %.3f",
            num_generated, len(rows), len(rows) / writer.num_rows,
        )  # fmt: skip
        run.rows_in, run.rows_out = num_generated + num_available, writer.num_rows


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
