"""Scores of every policy in; each policy against each earlier one out, paired by prompt.

Example: paste the line from logs/<run>/evaluation/summarise_evaluation.log
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray

from stages.core.artifacts.schemas import (
    BREAKDOWN,
    EVALUATION_PROMPTS,
    IMAGES,
    METRIC_SCORES,
    SUMMARY,
)
from stages.core.artifacts.tables import read_metadata, read_table, read_tables, write_table
from stages.core.data.prompts import prompt_id
from stages.core.errors import UserError
from stages.core.evaluation.statistics import Comparison, compare, holm, mean_over_pairs
from stages.core.execution.runtime import log, run_stage, stage

PromptScores = dict[str, NDArray[np.float64]]
"""Scores of each prompt's images."""
Row = dict[str, Any]
Prompts = Mapping[str, Row]
"""Rows of an evaluation set's prompts by prompt_id."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Scores of every policy in; each policy against each earlier one out, paired by prompt."""

    scores: tuple[tuple[str, str, Path], ...]
    """Prompt set, policy and its scores (schema metric_scores); policies in their order."""
    prompts: tuple[tuple[str, Path], ...] = ()
    """Prompt set and its prompts (schema evaluation_prompts): strata, repeats, categories."""
    others: tuple[tuple[str, str, Path], ...] = ()
    """Prompt set, '<run>/<policy>' of another run, and its scores, to compare every policy with."""
    output: Path
    """Where the comparisons go (schema evaluation_summary)."""
    breakdown: Path
    """Where those within each category and challenge go (schema evaluation_breakdown)."""


def main(args: Args) -> None:
    """Average a prompt's images first, then compare prompt by prompt."""
    with stage("summarise_evaluation") as run:
        table = read_scores(args.scores)
        others = read_scores(args.others)
        check_same_noise(args.scores, args.others)
        prompts = {name: read_prompt_rows(path) for name, path in args.prompts}
        rows: list[Row] = []
        parts: list[Row] = []
        for (prompt_set, metric), policies in table.items():
            where = {"prompt_set": prompt_set, "metric": metric}
            values = align(
                policies, others.get((prompt_set, metric), {}), ", ".join(where.values())
            )
            known = prompts.get(prompt_set, {})
            names = [known.get(name, {}) for name in values.prompts]
            run.rows_in += len(policies) * len(names)
            for policy, baseline in values.pairs:
                result = values.compare(policy, baseline, names)
                pair = {"policy": policy, "baseline": baseline, **asdict(result)}
                better = values.better_of_two[baseline]
                rows.append({**where, **pair, "better_of_two": better})
                if baseline == values.first:
                    log.info("%s, %s: %s", prompt_set, metric, in_words(policy, result))
            for axis, group, inside in groups(names):
                for policy, baseline in values.headline_pairs:
                    result = values.compare(policy, baseline, names, inside)
                    pair = {"policy": policy, "baseline": baseline, **asdict(result)}
                    parts.append({**where, "axis": axis, "group": group, **pair})
        adjust(rows)
        files = [path for *_, path in (*args.scores, *args.others)]
        files += [path for _, path in args.prompts]
        for path, found, schema in (
            (args.output, rows, SUMMARY),
            (args.breakdown, parts, BREAKDOWN),
        ):
            write_table(
                path, found, schema, stage="summarise_evaluation", arguments=args, inputs=files
            )
        run.rows_out = len(rows) + len(parts)


@dataclass(frozen=True)
class Aligned:
    """Prompt means of several policies on the same prompts, one row a policy."""

    prompts: list[str]
    """Their ids, in order."""
    means: Mapping[str, NDArray[np.float64]]
    """Of each policy and of each other run's."""
    better_of_two: Mapping[str, float | None]
    """Of each, what the better of two images of a prompt has over one; None with one a prompt."""
    policies: Sequence[str]
    """Of this run, in the order they were made."""

    @property
    def first(self) -> str:
        """The base."""
        return self.policies[0]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(policy, baseline): the first with itself, each with every earlier one, then the others."""
        names = self.policies
        found = [(self.first, self.first)]
        found += [(policy, base) for i, policy in enumerate(names) for base in names[:i]]
        others = [name for name in self.means if name not in names]
        return found + [(policy, other) for other in others for policy in names]

    @property
    def headline_pairs(self) -> list[tuple[str, str]]:
        """Each policy with the first one (itself included), and with the one before it."""
        names = self.policies
        found = [(policy, self.first) for policy in names]
        return found + list(zip(names[2:], names[1:], strict=False))

    def compare(
        self,
        policy: str,
        baseline: str,
        rows: Sequence[Row],
        inside: NDArray[np.bool_] | None = None,
    ) -> Comparison:
        """The comparison on all prompts or some: repeats of a text together, keyed sets by style."""
        chosen = np.flatnonzero(inside) if inside is not None else np.arange(len(rows))
        texts = [
            prompt_id(rows[i]["prompt"]) if rows[i] else self.prompts[i] for i in chosen.tolist()
        ]
        styles = [
            rows[i]["category"] if rows[i].get("item") is not None else "" for i in chosen.tolist()
        ]
        return compare(
            self.means[policy][chosen],
            self.means[baseline][chosen],
            strata=np.unique(styles, return_inverse=True)[1],
            clusters=np.unique(texts, return_inverse=True)[1],
        )


def read_scores(
    scores: Sequence[tuple[str, str, Path]],
) -> dict[tuple[str, str], dict[str, PromptScores]]:
    """For each prompt set and metric, the scores of each policy."""
    table: dict[tuple[str, str], dict[str, PromptScores]] = defaultdict(dict)
    for prompt_set, policy, path in scores:
        for metric, found in read_prompt_scores(path).items():
            table[prompt_set, metric][policy] = found
    return table


def read_prompt_scores(path: Path) -> dict[str, PromptScores]:
    """For each metric in the file, the scores of each prompt's images."""
    rows = read_table(path, METRIC_SCORES).to_pylist()
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        scores[row["metric"]][row["prompt_id"]].append(row["score"])
    return {
        metric: {name: np.array(values, np.float64) for name, values in prompts.items()}
        for metric, prompts in scores.items()
    }


def read_prompt_rows(path: Path) -> dict[str, Row]:
    """The prompts of a set by their id."""
    return {row["prompt_id"]: row for row in read_table(path, EVALUATION_PROMPTS).to_pylist()}


def align(
    policies: Mapping[str, PromptScores], others: Mapping[str, PromptScores], where: str
) -> Aligned:
    """All prompt means in one order. UserError if two policies were not scored on the same prompts."""
    first = next(iter(policies))
    prompts = sorted(policies[first])
    everyone = {**policies, **others}
    for name, scores in everyone.items():
        if sorted(scores) != prompts:
            raise UserError(
                f"{where}: {name} was scored on {len(scores)} prompts, {first} on "
                f"{len(prompts)}, and they are not the same; run generate_evaluation again for both"
            )
    means = {
        name: np.array([scores[p].mean() for p in prompts]) for name, scores in everyone.items()
    }
    better = {name: better_of_two(list(scores.values())) for name, scores in everyone.items()}
    return Aligned(prompts, means, better, list(policies))


def better_of_two(scores: Sequence[NDArray[np.float64]]) -> float | None:
    """What keeping the better of two images of a prompt gains over one, mean over prompts.

    The larger of two numbers exceeds their mean by half their distance. None unless some prompt has
    two images.
    """
    halves = [
        mean_over_pairs(values.tolist(), lambda one, other: abs(one - other) / 2)
        for values in scores
        if len(values) > 1
    ]
    return float(np.mean(halves)) if halves else None


def groups(rows: Sequence[Row]) -> Iterator[tuple[str, str, NDArray[np.bool_]]]:
    """(axis, group, which prompts) of every category and challenge with at least two prompts."""
    for axis in ("category", "challenge"):
        labels = [row.get(axis) for row in rows]
        for group in dict.fromkeys(sorted(filter(None, labels))):
            inside = np.array([label == group for label in labels])
            if inside.sum() > 1:
                yield axis, group, inside


def check_same_noise(
    scores: Sequence[tuple[str, str, Path]], others: Sequence[tuple[str, str, Path]]
) -> None:
    """UserError if another run's images started from other noise, or were sampled otherwise."""
    ours: dict[str, tuple[Row, Any]] = {}
    for prompt_set, name, path in others:
        if prompt_set not in ours:
            own = next((file for ours_set, _, file in scores if ours_set == prompt_set), None)
            if own is None:
                raise UserError(
                    f"--others names prompt set {prompt_set!r}, which --scores does not"
                )
            ours[prompt_set] = read_noise(own)
        seeds, settings = read_noise(path)
        if seeds != ours[prompt_set][0] or settings != ours[prompt_set][1]:
            raise UserError(
                f"{path}: the images of {name} on {prompt_set} were not sampled from the same noise "
                f"in the same way as this run's (its sampler: {settings}, here: "
                f"{ours[prompt_set][1]}), so they cannot be paired. Evaluate both runs with the same "
                "evaluation.seed, evaluation.images_per_prompt and sampling."
            )


def read_noise(path: Path) -> tuple[Row, Any]:
    """The seeds of the images behind some scores, and the sampler's settings."""
    images = [Path(name) for name in read_metadata(path)["arguments"].get("images", [])]
    if not images or not all(image.is_file() for image in images):
        raise UserError(
            f"{path} was made from images that are not there any more "
            f"({', '.join(map(str, images)) or 'none are named'}); they tell whether two runs started "
            "from the same noise. Run from the folder that the other run was made in, or put them back."
        )
    rows = read_tables(images, IMAGES, ["prompt_id", "candidate", "seed"]).to_pylist()
    seeds = {f"{row['prompt_id']}/{row['candidate']}": row["seed"] for row in rows}
    return seeds, read_metadata(images[0])["arguments"].get("settings")


def adjust(rows: Sequence[Row]) -> None:
    """Add Holm's adjustment of both tests over all rows of a prompt set, self-comparisons aside."""
    for prompt_set in {row["prompt_set"] for row in rows}:
        inside = [row for row in rows if row["prompt_set"] == prompt_set]
        tested = [row for row in inside if row["policy"] != row["baseline"]]
        for test in ("sign_p", "wilcoxon_p"):
            for row, value in zip(tested, holm([row[test] for row in tested]), strict=True):
                row[f"{test}_holm"] = value
            for row in inside:
                row.setdefault(f"{test}_holm", 1.0)


def in_words(policy: str, result: Comparison) -> str:
    """One line for the log."""
    return (
        f"{policy} {result.mean:.4f} ({result.difference:+.4f} "
        f"[{result.ci_low:+.4f}, {result.ci_high:+.4f}], wins {100 * result.win_rate:.0f} %)"
    )


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
