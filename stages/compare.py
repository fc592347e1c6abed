"""Two runs in; out: what differs between them, and which one scores higher where that can be paired.

Tells the settings that differ, how much of the data both have, which policies are the same, which stages ran
with other code. Scores are compared prompt by prompt where both runs have the prompt, from the same noise, by
the same sampler and the same metric: the difference is the second run minus the first, with its 95 % bootstrap
interval. The judges are compared on the held-out human pairs that both have. Changes nothing. Examples:
    python -m stages.compare results/shapes results/mine
    python -m stages.compare results/shapes results/mine --output comparison.parquet
    python -m stages.compare results/shapes results/mine --output comparison.csv
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pyarrow.csv
import tyro

from stages.core.artifacts.files import replacing
from stages.core.artifacts.tables import fitting, write_table
from stages.core.errors import UserError
from stages.core.execution.runtime import run_stage
from stages.core.inspection.run_table import RUN_COMPARISON
from stages.core.inspection.runs import (
    Paired,
    Run,
    different_code,
    different_settings,
    open_runs,
    paired_scores,
    shared_data,
    shared_policies,
)

SUFFIXES = (".parquet", ".csv")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Two runs in, what differs between them out."""

    first: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_A")]
    """The folder of a run, as results/shapes: what the other is compared with."""
    second: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_B")]
    """The folder of another run."""
    output: Path | None = None
    """Where the paired scores go too: a .parquet file (schema run_comparison), or a .csv file."""


def main(args: Args) -> None:
    """Compare, write, and print."""
    if args.output is not None and args.output.suffix not in SUFFIXES:
        raise UserError(
            f"--output is {args.output}; expected a name that ends in {' or '.join(SUFFIXES)}"
        )
    first, second = open_runs(args.first, args.second)
    paired = paired_scores(first, second)
    if args.output is not None:
        write(args.output, paired, args)
    for line in lines_of(first, second, paired):
        print(
            "".join(
                letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line
            )
        )


def write(path: Path, paired: Paired, args: Args) -> None:
    """The paired scores as a table."""
    if path.suffix == ".csv":
        with replacing(path) as part:
            pyarrow.csv.write_csv(fitting(paired.rows, path, RUN_COMPARISON, {}), part)
    else:
        write_table(
            path, paired.rows, RUN_COMPARISON, stage="compare", arguments=args, inputs=paired.files
        )


def lines_of(first: Run, second: Run, paired: Paired) -> Iterator[str]:
    """What is printed."""
    yield f"{first.folder} and {second.folder}"
    yield ""
    yield "Settings that differ"
    yield from setting_lines(first, second)
    yield ""
    yield "Data: how much each has, and both"
    for what, one, two, both in shared_data(first, second):
        yield f"  {what}: {one}, {two}; {both} in both"
    yield ""
    yield "Policies"
    policies = list(shared_policies(first, second))
    yield from (f"  {name}: {state}" for name, state in policies)
    if not policies:
        yield "  neither run has a finished one"
    if changed := different_code(first, second):
        yield ""
        yield f"Stages that ran with other code: {', '.join(changed)}"
    yield ""
    yield from score_lines(first, second, paired)


def setting_lines(first: Run, second: Run) -> Iterator[str]:
    """Each setting that differs, or why none is told."""
    for run in (first, second):
        if run.settings is None:
            yield f"  not known: {run.folder} has no config.json, which the report writes"
            return
    found = different_settings(first, second)
    yield from (f"  {key}: {one} and {two}" for key, one, two in found)
    if any("-" in (one, two) for _, one, two in found):
        yield "  (- is the default: config/README.md)"
    if not found:
        yield "  none"


def score_lines(first: Run, second: Run, paired: Paired) -> Iterator[str]:
    """The paired scores, and what could not be paired."""
    if paired.rows:
        yield f"Scores, {second.name} minus {first.name}, with 95 % intervals"
    for row in paired.rows:
        yield (
            f"  {row['prompt_set']}, {row['metric']}: {row['policy']} {row['mean']:.4f}, {row['baseline']} "
            f"{row['baseline_mean']:.4f}: {row['difference']:+.4f} [{row['ci_low']:+.4f}, {row['ci_high']:+.4f}], "
            f"wins {100 * row['win_rate']:.0f} % of {row['num_prompts']}, p = {row['wilcoxon_p']:.2g} "
            f"({row['wilcoxon_p_holm']:.2g} for so many tests)"
        )
    if not paired.rows:
        yield (
            f"Nothing can be paired: {first.name} and {second.name} share no evaluation prompt from the same noise "
            "and no held-out pair. Evaluate both on one file of prompts (evaluation.prompt_sets) with the same "
            "evaluation.seed, evaluation.images_per_prompt and sampling."
        )
    if paired.refused:
        yield ""
        yield "Not compared"
        yield from (f"  {sentence}" for sentence in paired.refused)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
