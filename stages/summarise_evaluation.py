"""Scores of every policy in; each policy against each earlier one out, paired by prompt.

Example: paste the line from logs/<run>/evaluation/summarise_evaluation.log
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tyro

from stages.core.artifacts import read_table, write_table
from stages.core.errors import UserError
from stages.core.runtime import log, run_stage, stage
from stages.core.schemas import METRIC_SCORES, SUMMARY
from stages.core.statistics import Comparison, compare

PromptMeans = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Scores of every policy in; each policy against each earlier one out, paired by prompt."""

    scores: tuple[tuple[str, str, Path], ...]
    """Prompt set, policy and its scores (schema metric_scores); policies in their order."""
    output: Path
    """Where the comparisons go (schema evaluation_summary)."""


def main(args: Args) -> None:
    """Average a prompt's images first, then compare prompt by prompt."""
    with stage("summarise_evaluation") as run:
        table: dict[tuple[str, str], dict[str, PromptMeans]] = defaultdict(dict)
        for prompt_set, policy, path in args.scores:
            for metric, means in read_prompt_means(path).items():
                table[prompt_set, metric][policy] = means
                run.rows_in += len(means)
        rows = []
        for (prompt_set, metric), policies in table.items():
            for policy, baseline, comparison in compare_all(policies, f"{prompt_set}, {metric}"):
                rows.append(
                    {
                        "prompt_set": prompt_set,
                        "metric": metric,
                        "policy": policy,
                        "baseline": baseline,
                        **asdict(comparison),
                    }
                )
                if baseline == next(iter(policies)) or policy == baseline:
                    log.info("%s, %s: %s", prompt_set, metric, in_words(policy, comparison))
        files = [path for *_, path in args.scores]
        write_table(
            args.output, rows, SUMMARY, stage="summarise_evaluation", arguments=args, inputs=files
        )
        run.rows_out = len(rows)


def read_prompt_means(path: Path) -> dict[str, PromptMeans]:
    """For each metric in the file, the mean score of each prompt's images."""
    rows = read_table(path, METRIC_SCORES).to_pylist()
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        scores[row["metric"]][row["prompt_id"]].append(row["score"])
    return {
        metric: {name: float(np.mean(values)) for name, values in prompts.items()}
        for metric, prompts in scores.items()
    }


def compare_all(policies: dict[str, PromptMeans], where: str) -> list[tuple[str, str, Comparison]]:
    """(policy, baseline, comparison): the first with itself, then each with every earlier one.

    UserError if two policies were not scored on the same prompts.
    """
    names = list(policies)
    prompts = sorted(policies[names[0]])
    for name in names:
        if sorted(policies[name]) != prompts:
            raise UserError(
                f"{where}: {name} was scored on {len(policies[name])} prompts, {names[0]} on "
                f"{len(prompts)}, and they are not the same; run generate_evaluation again for both"
            )
    values = {name: np.array([policies[name][p] for p in prompts]) for name in names}
    pairs = [(names[0], names[0])]
    pairs += [(policy, base) for i, policy in enumerate(names) for base in names[:i]]
    return [(p, b, compare(values[p], values[b])) for p, b in pairs]


def in_words(policy: str, result: Comparison) -> str:
    """One line for the log."""
    return (
        f"{policy} {result.mean:.4f} ({result.difference:+.4f} "
        f"[{result.ci_low:+.4f}, {result.ci_high:+.4f}], wins {100 * result.win_rate:.0f} %)"
    )


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
