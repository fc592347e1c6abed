"""Images in; one metric's score of each out.

Example: paste the line from logs/<run>/evaluation/<set>/iter01/score_metric-total.log
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from stages.core.artifacts import read_tables, write_table
from stages.core.errors import UserError
from stages.core.images import decode_image
from stages.core.runtime import run_stage, stage
from stages.core.schemas import IMAGES, METRIC_SCORES
from stages.metrics import load_scorer, score_in_batches


@dataclass(frozen=True, kw_only=True)
class Args:
    """Images in, one metric's score of each out."""

    images: tuple[Path, ...]
    """Shards of images or candidates (schema images)."""
    metric: str
    """Name of the metric."""
    output: Path
    """Where the scores go (schema metric_scores)."""


def main(args: Args) -> None:
    """Decode, score, write; not one missing or infinite score."""
    with stage("score_metric") as run:
        scorer = load_scorer(args.metric)
        columns = ["prompt_id", "prompt", "candidate", "image"]
        rows = read_tables(args.images, IMAGES, columns).to_pylist()
        images = [np.asarray(decode_image(row["image"]["bytes"])) for row in rows]
        scores = score_in_batches(scorer, images, [row["prompt"] for row in rows])
        if not np.isfinite(scores).all():
            bad = rows[int(np.flatnonzero(~np.isfinite(scores))[0])]
            raise UserError(
                f"metric {args.metric!r} gave no finite score for prompt {bad['prompt']!r}, "
                f"candidate {bad['candidate']}"
            )
        out = [
            {
                "prompt_id": row["prompt_id"],
                "candidate": row["candidate"],
                "metric": args.metric,
                "score": value,
            }
            for row, value in zip(rows, scores, strict=True)
        ]
        write_table(
            args.output, out, METRIC_SCORES,
            stage="score_metric", arguments=args, inputs=args.images,
        )  # fmt: skip
        run.rows_in, run.rows_out = len(rows), len(out)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
