"""Images in; one metric's score of each out.

Example: paste the line from logs/<run>/evaluation/<set>/iter01/score_metric-total.log
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from stages.core.artifacts.images import decode_image
from stages.core.artifacts.schemas import IMAGES, METRIC_SCORES
from stages.core.artifacts.spools import RowSpool
from stages.core.artifacts.tables import read_batches, read_tables, write_table
from stages.core.errors import UserError
from stages.core.execution.ahead import ahead, threads_beside
from stages.core.execution.runtime import choose_device, run_stage, stage
from stages.metrics import (
    IMAGES_PER_BATCH,
    load_scorer,
    needs_gpu,
    score_in_batches,
    spec_of,
)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Images in, one metric's score of each out."""

    images: tuple[Path, ...]
    """Shards of images or candidates (schema images)."""
    metric: str
    """Name of the metric."""
    output: Path
    """Where the scores go (schema metric_scores); its metadata says what made them."""
    options: dict[str, str] = field(default_factory=dict)
    """The metric's own options, as weights and version: name, value, name, value, ..."""
    images_per_batch: int = IMAGES_PER_BATCH
    """Images that are scored together; changes no score."""
    threads: int = 1
    """CPU threads, for metrics that are networks."""
    jobs_per_gpu: int = 1
    """Jobs of this kind that may share a GPU; 1 has it alone."""


def main(args: Args) -> None:
    """Decode, score, write; not one missing or infinite score."""
    with stage("score_metric") as run:
        device = choose_device(args.threads, args.jobs_per_gpu) if needs_gpu(args.metric) else None
        scorer = load_scorer(args.metric, args.options, device)
        folder = args.images[0].parent
        keys = read_tables(args.images, IMAGES, ["prompt_id", "prompt", "candidate"]).to_pylist()
        # In an order that the number of shards does not change.
        order = sorted(
            range(len(keys)),
            key=lambda number: (keys[number]["prompt_id"], keys[number]["candidate"]),
        )
        rows = [keys[number] for number in order]
        with RowSpool(args.output.parent) as spool:
            for path in args.images:
                for batch in read_batches(path, IMAGES, ["image"], size=args.images_per_batch):
                    spool.add(batch)
            images = ahead(
                decoded,
                (
                    (spool.read(number)["image"]["bytes"], where(row, folder))
                    for number, row in zip(order, rows, strict=True)
                ),
                threads_beside("cpu" if device is None else device.type),
            )
            prompts = [row["prompt"] for row in rows]
            scores = score_in_batches(scorer, images, prompts, args.images_per_batch)
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
            stage="score_metric", arguments=asdict(args) | {"spec": spec_of(scorer)},
            inputs=args.images,
        )  # fmt: skip
        run.rows_in, run.rows_out = len(rows), len(out)


def decoded(item: tuple[bytes, str]) -> np.ndarray:
    """The pixels of an image; its place is named in errors."""
    return np.asarray(decode_image(*item))


def where(row: Mapping[str, Any], folder: Path) -> str:
    """How an error names the image of a row: its shards' folder, prompt and candidate."""
    return f"{folder}, prompt {row['prompt_id']}, candidate {row['candidate']}"


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
