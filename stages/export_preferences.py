r"""Preference tables in; a dataset that other trainers read out, with its card.

Example:
    python -m stages.export_preferences --preferences results/shapes/iter01/preferences.parquet \\
        --format pickapic --output exports/shapes-iter01
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from stages.core.artifacts.tables import read_metadata
from stages.core.errors import UserError
from stages.core.execution.runtime import log, run_stage, stage
from stages.core.export.cards import dataset_card
from stages.core.export.folders import check_replaceable, export_folder, finish_export
from stages.core.export.markdown import plain_settings
from stages.core.export.preferences import (
    WRITERS,
    Format,
    Job,
    count_pairs,
    read_pairs,
    typed_first,
)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Preference tables in; a dataset that other trainers read out, with its card."""

    preferences: tuple[Path, ...]
    """Tables of pairs: preferences.parquet or pairs.parquet of a run."""
    format: Format
    """pickapic: Pick-a-Pic v2's columns; preference: prompt, chosen, rejected; or files of images."""
    output: Path
    """Folder to write; an earlier export there is replaced."""
    source: Literal["all", "human", "generated"] = "all"
    """Which pairs to export."""
    pairs_per_shard: int = 1000
    """Pairs of each Parquet or tar file."""


def main(args: Args) -> None:
    """Count first, for the card and the shards' names; then stream the pairs."""
    with stage("export_preferences") as run:
        if args.pairs_per_shard < 1:
            raise UserError(f"--pairs-per-shard must be 1 or more, found {args.pairs_per_shard}")
        check_replaceable(args.output)
        source = None if args.source == "all" else args.source
        counts = count_pairs(args.preferences, source)
        made = []
        for path in args.preferences:
            metadata = read_metadata(path)
            arguments = metadata.get("arguments")
            settings = plain_settings(arguments if isinstance(arguments, dict) else {})
            name = "/".join(path.parts[-3:])  # a published card names no machine's folders
            made.append((name, str(metadata.get("stage", "an unknown stage")), settings))
        with export_folder(args.output) as folder:
            job = Job(folder=folder / "data", counts=counts, pairs_per_shard=args.pairs_per_shard)
            rows = typed_first if args.format == "webdataset" else read_pairs
            WRITERS[args.format](job, rows(args.preferences, source))
            finish_export(
                folder, dataset_card(args.format, counts, made), stage="export_preferences",
                arguments=args, inputs=args.preferences,
                facts={"format": args.format, "num_pairs": counts.num_pairs,
                       "num_prompts": len(counts.by_prompt)},
            )  # fmt: skip
        run.rows_in = run.rows_out = counts.num_pairs
        log.info("export_preferences: %s (%s) is ready", args.output, args.format)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
