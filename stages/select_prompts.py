r"""A pool of prompts in; one set out that shares no prompt with any other set of the run.

Example:
    python -m stages.select_prompts --pool prompts.txt --exclude preferences.parquet \\
        --shuffle-seed 0 --skip 0 --take 256 --output iter01.parquet
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from stages.core.artifacts.schemas import LIKED_PAIRS, PROMPTS
from stages.core.artifacts.tables import holds, read_table, write_table
from stages.core.data.prompts import prompt_id, read_pool, read_prompts, select_prompts
from stages.core.execution.runtime import log, run_stage, stage


@dataclass(frozen=True, kw_only=True)
class Args:
    """A pool of prompts in, one set out that shares no prompt with any other."""

    pool: tuple[Path, ...]
    """Prompts to choose from: .txt (one a line), .csv, .tsv, .json, .jsonl or .parquet files.

    Empty ones and those of more than 10,000 letters are left out and counted."""
    exclude: tuple[Path, ...] = ()
    """Prompts that must not be chosen: seed pairs, held-out pairs, evaluation sets."""
    shuffle_seed: int | None
    """Seed of the pool's order; None keeps the file's."""
    skip: int
    """Prompts at the front of that order that belong to other sets."""
    take: int | None
    """Prompts to choose; None takes all that are left."""
    output: Path
    """Where the set goes (schema prompts)."""


def main(args: Args) -> None:
    """Choose prompts by position in a seeded order, so that sets of one seed never overlap."""
    with stage("select_prompts") as run:
        found = read_pool(*args.pool)
        if found.num_left_out:
            log.warning(
                "select_prompts: %d of %d prompts of the pool are empty or too long and left out",
                found.num_left_out, found.num_read,
            )  # fmt: skip
        pool = found.prompts
        excluded = {prompt_id(prompt) for prompt in read_prompts(*args.exclude)}
        excluded |= {prompt_id(prompt) for prompt in prompts_of_losers(args.exclude)}
        overlap = sum(prompt_id(prompt) in excluded for prompt in pool)
        log.info("select_prompts: %d of %d pool prompts are in other sets", overlap, len(pool))
        take = len(pool) - overlap - args.skip if args.take is None else args.take
        chosen = select_prompts(
            pool, excluded=excluded, shuffle_seed=args.shuffle_seed, skip=args.skip, take=take
        )
        rows = [{"prompt_id": prompt_id(prompt), "prompt": prompt} for prompt in chosen]
        inputs = [*args.pool, *args.exclude]
        write_table(
            args.output, rows, PROMPTS, stage="select_prompts", arguments=args, inputs=inputs
        )
        run.rows_in, run.rows_out = len(pool), len(rows)


def prompts_of_losers(paths: Iterable[Path]) -> Iterator[str]:
    """The disliked images' prompts in tables of held-out likes, which stand beside the liked ones'."""
    for path in paths:
        if path.suffix == ".parquet" and holds(path, LIKED_PAIRS):
            yield from read_table(path, LIKED_PAIRS, ["loser_prompt"]).column(0).to_pylist()


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
