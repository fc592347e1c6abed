"""Generated pairs and human pairs in; the mix to train on out. Paper: SAIL Sec. 4.2, Alg. 1.

Example: paste the line from logs/<run>/iter01/mix_preferences.log
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import tyro

from stages.core.artifacts.decisions import Decided, read_decisions, turned
from stages.core.artifacts.joins import joined_batches
from stages.core.artifacts.schemas import LIKES, PREFERENCES, TRAINING_PAIRS
from stages.core.artifacts.tables import (
    TableWriter,
    holds,
    num_rows,
    read_batches,
    read_table,
    writing_table,
)
from stages.core.errors import UserError
from stages.core.execution.runtime import log, run_stage, stage
from stages.core.method.mixing import choose_without_replacement, num_human_pairs
from stages.core.method.seeding import seed_of

PAIRS_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Args:
    """Generated pairs and human pairs in, the mix to train on out."""

    pairs: Path
    """This iteration's generated pairs (schema training_pairs); all are kept that nobody vetoed."""
    preferences: Path
    """Human pairs (schema preferences); of single likes (schema likes) none can be taken."""
    latents: Path
    """Latents of the human pairs (schema pair_latents)."""
    decisions: tuple[Path, ...] = ()
    """What a person decided about these pairs in the audit (schema decisions); none without."""
    seed_fraction: float
    """Share of human pairs in the mix (paper: 0.25); 0 is the ablation without mixup."""
    seed: int
    """Run seed: decides, with the iteration, which human pairs join."""
    iteration: int
    """Number of this iteration, from 1."""
    output: Path
    """Where the mix goes (schema training_pairs)."""


def main(args: Args) -> None:
    """Keep the generated pairs that nobody vetoed, and draw human pairs without replacement."""
    with stage("mix_preferences") as run:
        are_pairs = not holds(args.preferences, LIKES)
        refuse_likes(args, are_pairs=are_pairs)
        num_generated = num_rows(args.pairs)
        num_available = num_rows(args.preferences) if are_pairs else 0
        decisions = read_decisions(args.decisions)
        generated = decisions.about(args.pairs, TRAINING_PAIRS)
        human = decisions.about(args.preferences, PREFERENCES) if are_pairs else Decided()
        kept = generated.kept(num_generated)
        if not kept:
            raise UserError(
                f"all {num_generated} pairs of {args.pairs} are vetoed in "
                f"{' and '.join(map(str, args.decisions))}: there is nothing to train iteration "
                f"{args.iteration} on. Take some vetoes back with python -m stages.audit."
            )
        wanted = num_human_pairs(num_prompts(args.pairs, kept), args.seed_fraction)
        if wanted > num_available - len(human.vetoed):
            log.warning(
                "mix_preferences: %d human pairs would make a share of %.2f, there are %d; "
                "all are used", wanted, args.seed_fraction, num_available - len(human.vetoed),
            )  # fmt: skip
        seed = seed_of(args.seed, "mix_preferences", args.iteration)
        drawn = choose_without_replacement(num_available, wanted, seed, human.vetoed).tolist()
        with writing_table(
            args.output, TRAINING_PAIRS, stage="mix_preferences", arguments=args,
            inputs=[args.pairs, args.preferences, args.latents, *args.decisions],
        ) as writer:  # fmt: skip
            batches = read_batches(args.pairs, TRAINING_PAIRS, size=PAIRS_AT_ONCE, rows=kept)
            write_turned(writer, batches, kept, generated)
            if are_pairs:
                batches = joined_batches(args.preferences, args.latents, drawn, size=PAIRS_AT_ONCE)
                write_turned(writer, batches, drawn, human)
        if len(decisions):
            log.info(
                "mix_preferences: of %d decisions %d veto and %d flip generated pairs, %d veto and %d "
                "flip human pairs, %d ask for what is so already, %d are stale: no pair has their images",
                len(decisions), len(generated.vetoed), len(generated.flipped), len(human.vetoed),
                len(human.flipped), generated.num_as_wished + human.num_as_wished, decisions.num_stale,
            )  # fmt: skip
        log.info(
            "mix_preferences: %d generated and %d human pairs, a human share of %.3f",
            len(kept), len(drawn), len(drawn) / writer.num_rows,
        )  # fmt: skip
        run.rows_in, run.rows_out = num_generated + num_available, writer.num_rows


def refuse_likes(args: Args, *, are_pairs: bool) -> None:
    """UserError for a share of human pairs where people's labels are single likes."""
    if args.seed_fraction and not are_pairs:
        raise UserError(
            f"mix_preferences.seed_fraction is {args.seed_fraction}, and {args.preferences} holds single likes, which "
            "are no pairs; set it to 0"
        )


def num_prompts(pairs: Path, kept: Sequence[int]) -> int:
    """How many prompts some rows are of: pairs, or lists where a prompt has several rows."""
    names = read_table(pairs, TRAINING_PAIRS, ["prompt_id"]).column("prompt_id").to_pylist()
    return len({names[row] for row in kept})


def write_turned(
    writer: TableWriter, batches: Iterable[pa.Table], rows: Sequence[int], decided: Decided
) -> None:
    """Write the pairs that stand at `rows` of their table, the flipped ones exchanged."""
    start = 0
    for batch in batches:
        writer.write(turned(batch, rows[start : start + len(batch)], decided.flipped))
        start += len(batch)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
