"""Generated pairs and human pairs in; the mix to train on out. Paper: SAIL Sec. 4.2, Alg. 1.

Example: paste the line from logs/<run>/iter01/mix_preferences.log
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import tyro

from stages.core.artifacts import read_table, write_table
from stages.core.mixing import choose_without_replacement, num_human_pairs
from stages.core.runtime import log, run_stage, stage
from stages.core.schemas import PAIR_LATENTS, PREFERENCES, TRAINING_PAIRS
from stages.core.seeding import seed_of
from stages.core.tables import join_latents


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
        generated = read_table(args.pairs, TRAINING_PAIRS)
        names = read_table(args.preferences, PREFERENCES, ["pair_id"])
        wanted = num_human_pairs(len(generated), args.seed_fraction)
        if wanted > len(names):
            log.warning(
                "mix_preferences: %d human pairs would make a share of %.2f, there are %d; "
                "all are used", wanted, args.seed_fraction, len(names),
            )  # fmt: skip
        seed = seed_of(args.seed, "mix_preferences", args.iteration)
        rows = pa.array(choose_without_replacement(len(names), wanted, seed))
        human = join_latents(
            read_table(args.preferences, PREFERENCES).take(rows),
            read_table(args.latents, PAIR_LATENTS).take(rows),
            args.latents,
        )
        layout = TRAINING_PAIRS.arrow
        mix = pa.concat_tables([table.select(layout.names).cast(layout)
                                for table in (generated, human)])  # fmt: skip
        write_table(
            args.output, mix, TRAINING_PAIRS, stage="mix_preferences", arguments=args,
            inputs=[args.pairs, args.preferences, args.latents],
        )  # fmt: skip
        log.info(
            "mix_preferences: %d generated and %d human pairs, a human share of %.3f",
            len(generated), len(human), len(human) / len(mix),
        )  # fmt: skip
        run.rows_in, run.rows_out = len(generated) + len(names), len(mix)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
