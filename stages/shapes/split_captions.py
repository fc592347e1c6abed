r"""The captions of the embedded world out, split into seed, training and evaluation sets.

Only captions that leave position or background unsaid take part: what people like beyond the
caption shows in them. The evaluation folds are the same for every seed: 'tuning' is for finding
settings, 'report' for what is reported. Example:
    python -m stages.shapes.split_captions --seed 0 --num-seed-captions 260 \\
        --evaluation-fold report --num-evaluation-captions 200 \\
        --seed-captions seed.txt --pool pool.txt --evaluation eval.txt
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from stages.core.artifacts.files import write_text
from stages.core.errors import UserError
from stages.core.execution.runtime import run_stage, stage
from stages.core.method.seeding import seed_of
from stages.shapes.captions import open_captions
from stages.shapes.folds import FOLD_CAPTIONS


@dataclass(frozen=True, kw_only=True)
class Args:
    """The captions of the embedded world out, split into seed, training and evaluation sets."""

    seed: int
    """Run seed: decides which captions people are asked about."""
    num_seed_captions: int
    """Captions that human pairs are made for."""
    evaluation_fold: Literal["report", "tuning"]
    """Which held-out captions to evaluate on."""
    num_evaluation_captions: int = FOLD_CAPTIONS
    """How many of them: the first."""
    seed_captions: Path
    """Where the captions for human pairs go, one a line."""
    pool: Path
    """Where the captions for the iterations go."""
    evaluation: Path
    """Where the evaluation captions go."""


def main(args: Args) -> None:
    """Set both evaluation folds aside, then draw the seed captions."""
    with stage("split_captions") as run:
        captions = [str(caption) for caption in open_captions()]
        order = [captions[i] for i in np.random.default_rng(20_260_205).permutation(len(captions))]
        folds = {
            "report": order[:FOLD_CAPTIONS],
            "tuning": order[FOLD_CAPTIONS : 2 * FOLD_CAPTIONS],
        }
        rest = order[2 * FOLD_CAPTIONS :]
        if not 0 < args.num_seed_captions < len(rest):
            raise UserError(
                f"num_seed_captions must be between 1 and {len(rest) - 1}, found "
                f"{args.num_seed_captions}"
            )
        if not 0 < args.num_evaluation_captions <= FOLD_CAPTIONS:
            raise UserError(
                f"num_evaluation_captions must be between 1 and {FOLD_CAPTIONS}, found "
                f"{args.num_evaluation_captions}"
            )
        rng = np.random.default_rng(seed_of(args.seed, "split_captions"))
        rest = [rest[i] for i in rng.permutation(len(rest))]
        write_text(args.seed_captions, "\n".join(rest[: args.num_seed_captions]) + "\n")
        write_text(args.pool, "\n".join(rest[args.num_seed_captions :]) + "\n")
        evaluation = folds[args.evaluation_fold][: args.num_evaluation_captions]
        write_text(args.evaluation, "\n".join(evaluation) + "\n")
        run.rows_in, run.rows_out = len(captions), len(rest) + len(evaluation)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
