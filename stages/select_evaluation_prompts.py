"""A file of evaluation prompts in; the set out, with its categories and a key for every prompt.

Example:
    python -m stages.select_evaluation_prompts --files hpsv2.json --layout hpsv2 --output set.parquet
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from stages.core.artifacts.schemas import EVALUATION_PROMPTS
from stages.core.artifacts.tables import write_table
from stages.core.data.evaluation_prompts import PromptLayout, read_evaluation_prompts
from stages.core.execution.runtime import log, run_stage, stage


@dataclass(frozen=True, kw_only=True)
class Args:
    """A file of evaluation prompts in, the set out."""

    files: tuple[Path, ...]
    """Prompts in the layout."""
    layout: PromptLayout
    """'plain' (.txt, .csv, .tsv, .json, .jsonl or .parquet), 'partiprompts' or 'hpsv2'."""
    output: Path
    """Where the set goes (schema evaluation_prompts)."""


def main(args: Args) -> None:
    """Read the file; in a keyed set equal prompts stay apart, elsewhere the first one stands."""
    with stage("select_evaluation_prompts") as run:
        prompts = read_evaluation_prompts(args.files, args.layout)
        rows = [{"prompt_id": prompt.prompt_id, **asdict(prompt)} for prompt in prompts]
        categories = {prompt.category for prompt in prompts if prompt.category is not None}
        log.info(
            "select_evaluation_prompts: %d prompts in %d categories", len(rows), len(categories)
        )
        write_table(
            args.output, rows, EVALUATION_PROMPTS,
            stage="select_evaluation_prompts", arguments=args, inputs=args.files,
        )  # fmt: skip
        run.rows_in, run.rows_out = len(prompts), len(rows)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
