"""What warns of collapse, one row an iteration: the judge's accuracy, diversity, inflation, drift.

Paper: SAIL Sec. 5.5 names the two failures, overconfidence with lost diversity and a judge that
forgets. Example: paste the line from logs/<run>/evaluation/summarise_guards.log
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from stages.core.artifacts.schemas import HOLDOUT_REWARDS, PROMPTS, RELIABILITY
from stages.core.artifacts.tables import read_table, read_tables, write_table
from stages.core.evaluation.guard_tables import Evidence, GuardTables, floats, prompts_of
from stages.core.evaluation.guards import GUARDS_TABLE, Limits, all_warnings, in_words, measured
from stages.core.evaluation.statistics import reliability
from stages.core.execution.runtime import log, run_stage, stage
from stages.core.models.loading import ModelSettings, Source
from stages.core.models.tokens import num_truncated

PAIRS_PER_BIN = 20
"""Of the reliability curve, at least; up to eight bins."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """What warns of collapse, one row an iteration."""

    holdout: tuple[Path, ...]
    """Held-out pairs as each policy judges them, from iteration 0 (schema holdout_rewards)."""
    diversity: tuple[Path, ...]
    """How far each policy's images differ, from iteration 0 (schema diversity)."""
    pairs: tuple[Path, ...]
    """Generated pairs of each iteration, from 1 (schema training_pairs)."""
    rewards: tuple[tuple[int, Path], ...]
    """Iteration and rewards of its candidates as the judge weighted them (schema judged)."""
    candidate_scores: tuple[tuple[int, Path], ...] = ()
    """Iteration and a metric's scores of its candidates (schema metric_scores)."""
    prompts: tuple[Path, ...]
    """Evaluation prompts, to see how many the text encoder cuts (any table with a column prompt)."""
    model: ModelSettings
    """The pretrained model, for its tokenizer."""
    limits: Limits
    """Where a measure becomes a warning on the terminal."""
    output: Path
    """Where the measures go (schema guards)."""
    reliability: Path
    """Where the judge's reliability goes (schema reliability)."""
    threads: int = 1
    """CPU threads; it needs no second."""


def main(args: Args) -> None:
    """Measure every iteration by itself."""
    with stage("summarise_guards") as run:
        tables = guard_tables(args)
        rows = [measured(Evidence(tables, number)) for number in range(len(args.holdout))]
        for row in rows:
            log.info("guards, %s: %s", row["policy"], in_words(row))
        for sentence in all_warnings(rows, args.limits):
            log.warning("guards: %s", sentence)
        inputs = [*args.holdout, *args.diversity, *args.pairs, *args.prompts]
        for named in (args.rewards, args.candidate_scores):
            inputs += [path for _, path in named]
        write_table(
            args.output, rows, GUARDS_TABLE, stage="summarise_guards", arguments=args, inputs=inputs
        )
        write_table(
            args.reliability, reliability_rows(args.holdout), RELIABILITY,
            stage="summarise_guards", arguments=args, inputs=args.holdout,
        )  # fmt: skip
        run.rows_in, run.rows_out = len(inputs), len(rows)


def guard_tables(args: Args) -> GuardTables:
    """What guards are measured on, by iteration."""
    return GuardTables(
        holdout=dict(enumerate(args.holdout)),
        diversity=dict(enumerate(args.diversity)),
        pairs=dict(enumerate(args.pairs, start=1)),
        rewards=grouped(args.rewards),
        candidate_scores=grouped(args.candidate_scores),
        truncated_share=truncated_share(args),
    )


def grouped(named: tuple[tuple[int, Path], ...]) -> dict[int, list[Path]]:
    """The files of each iteration."""
    found: dict[int, list[Path]] = defaultdict(list)
    for iteration, path in named:
        found[iteration].append(path)
    return found


def truncated_share(args: Args) -> float:
    """Share of the different evaluation prompts that the model's text encoder cuts."""
    texts = read_tables(args.prompts, PROMPTS, ["prompt"]).column("prompt").to_pylist()
    different = list(dict.fromkeys(texts))
    return num_truncated(Source(args.model).tokenizer(), different) / len(different)


def reliability_rows(holdout: tuple[Path, ...]) -> list[dict[str, Any]]:
    """The judge's bins of every iteration."""
    rows = []
    for iteration, path in enumerate(holdout):
        table = read_table(path, HOLDOUT_REWARDS)
        judged = floats(table, "probability")
        num_bins = min(8, max(1, len(judged) // PAIRS_PER_BIN))
        rows += [
            {"iteration": iteration, "policy": f"iter{iteration:02d}", **asdict(part)}
            for part in reliability(judged, num_bins, clusters=prompts_of(table))
        ]
    return rows


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
