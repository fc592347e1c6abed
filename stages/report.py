"""All that a run measured in; one self-contained page out: did it help, can one trust it, and why.

Example: paste the line from logs/<run>/report.log
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from stages.core.artifacts import read_metadata, read_table, write_text
from stages.core.errors import UserError
from stages.core.figures import LN_2, Series, histogram, series_panel, training_panel
from stages.core.fingerprint import code_version
from stages.core.guards import MEASURES, Field, Guard, Limits, Measure, seed_guard, warning
from stages.core.runtime import log, run_stage, stage
from stages.core.schemas import GUARDS, IMAGES, PREFERENCES, SUMMARY, TRAINING, Schema
from stages.core.thumbnails import thumbnail
from stages.core.verdicts import (
    BASE,
    DASH,
    LABELS,
    Comparison,
    Evaluation,
    number,
    percent,
    sides_sentence,
    significant,
    steps_sentence,
    verdict,
)

Row = dict[str, Any]

MARKS = {"higher": "▲", "lower": "▼", "unclear": "◆"}
NUM_FOR_AUDIT = 2
"""Pairs of each iteration that are marked for audit: the least certain ones."""
PAIR_COLUMNS = (
    "pair_id",
    "prompt",
    "source",
    "iteration",
    "winner_score",
    "loser_score",
    "margin",
    "margin_standard_error",
    "probability",
)


@dataclass(frozen=True, kw_only=True)
class Args:
    """All that a run measured in, one self-contained page out."""

    run: str
    """Name of the run, for the title."""
    config: Path
    """The run's full configuration (JSON)."""
    summary: Path
    """Paired comparisons of policies (schema evaluation_summary)."""
    guards: Path
    """Measures of each iteration (schema guards)."""
    primary_metric: str
    """Metric whose verdicts head the page."""
    primary_set: str
    """Evaluation prompts whose verdicts head the page."""
    min_reward_accuracy: float
    """Warn when the interval of the reward's accuracy reaches down to this; 0.5 is chance."""
    max_confident_share: float
    """Warn when more than this share of an iteration's pairs has p(winner > loser) > 0.9."""
    min_diversity_share: float
    """Warn when diversity falls below this share of iteration 0's."""
    images: tuple[Path, ...]
    """Images of one prompt set, one table per policy, in the order of --policies (schema images)."""
    policies: tuple[str, ...]
    """Names of the policies: base iter00 iter01 ..."""
    pairs: tuple[Path, ...] = ()
    """Preference pairs of iterations 1, 2 ... (schema preferences or training_pairs)."""
    training: tuple[Path, ...]
    """Per-step measures of iterations 0, 1 ... (schema training)."""
    import_summary: Path
    """Counts of the human pairs that were read, dropped and kept (JSON)."""
    num_prompts_shown: int = 8
    """Prompts in the before-and-after grid, and pairs of each iteration."""
    output: Path
    """Where the page goes (HTML)."""

    @property
    def limits(self) -> Limits:
        """Where a guard becomes a warning."""
        return Limits(
            min_reward_accuracy=self.min_reward_accuracy,
            max_confident_share=self.max_confident_share,
            min_diversity_share=self.min_diversity_share,
        )


@dataclass(frozen=True)
class Panel:
    """A figure with its title and caption."""

    title: str
    svg: Markup
    caption: str


def main(args: Args) -> None:
    """Read everything, put it into words and figures, and write the page."""
    with stage("report") as run:
        summary = read_table(args.summary, SUMMARY).to_pylist()
        evaluation = read_evaluation(summary, args)
        guards = read_guards(args.guards)
        trainings = [read_table(path, TRAINING, ["loss", "implicit_accuracy"])
                     for path in args.training]  # fmt: skip
        iteration_pairs = [pairs_view(path, args.num_prompts_shown) for path in args.pairs]
        context = {
            "run": args.run,
            "primary_set": args.primary_set,
            "labels": LABELS,
            "marks": MARKS,
            **headline_view(evaluation, args),
            **metrics_view(evaluation, args),
            **guards_view(guards, args.limits),
            **images_view(args),
            "iteration_pairs": iteration_pairs,
            "training_panels": training_panels(trainings, args.training),
            **data_view(args),
        }
        page = environment().get_template("report.html.jinja").render(context)
        write_text(args.output, page)
        run.rows_in = len(summary) + len(guards) + sum(map(len, trainings))
        run.rows_in += sum(group["num_pairs"] for group in iteration_pairs)
        run.rows_out = 1
        log.info("report: %s, %.1f MB", args.output, len(page.encode()) / 1e6)


def environment() -> Environment:
    """Where the template is, escaping every text that comes from a table."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "core"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def read_evaluation(rows: list[Row], args: Args) -> Evaluation:
    """The summary, known to hold the primary set, the primary metric and base."""
    evaluation = Evaluation(rows, args.policies)
    for flag, wanted, found in (
        ("primary-set", args.primary_set, evaluation.prompt_sets),
        ("primary-metric", args.primary_metric, evaluation.metrics(args.primary_set)),
    ):
        if wanted not in found:
            raise UserError(
                f"--{flag} {wanted!r} is not in {args.summary} "
                f"(found: {', '.join(found) or 'nothing'}). Name one of these."
            )
    if BASE not in evaluation.policies:
        raise UserError(
            f"{args.summary} compares nothing with {BASE!r} (found: "
            f"{', '.join(evaluation.policies)}). Evaluate the base model as well."
        )
    return evaluation


def read_guards(path: Path) -> list[Guard]:
    """The guards by iteration, known to start with iteration 0."""
    rows = read_table(path, GUARDS).to_pylist()
    guards = sorted((Guard(**row) for row in rows), key=lambda guard: guard.iteration)
    if seed_guard(guards) is None:
        raise UserError(
            f"{path} has no row of iteration 0, with which diversity is compared. Make it anew."
        )
    return guards


def headline_view(evaluation: Evaluation, args: Args) -> Row:
    """The verdicts on the primary metric: the last policy against base, each against the last."""
    name, metric = args.primary_set, args.primary_metric
    decimals = evaluation.decimals(name, metric)
    last = evaluation.policies[-1]
    overall = evaluation.against(name, metric, last, BASE)
    steps = present(
        evaluation.against(name, metric, policy, evaluation.previous(policy))
        for policy in evaluation.policies
    )
    others = present(
        evaluation.against(name, other, last, BASE)
        for other in evaluation.metrics(name)
        if other != metric
    )
    return {
        "headline": {
            "overall": overall and verdict(overall, decimals),
            "steps": [verdict(step, decimals) for step in steps],
            "steps_sentence": steps_sentence(steps) if steps else "",
            "others_sentence": sides_sentence(others) if others else "",
            "best_sentence": best_sentence(evaluation, name, metric),
        }
    }
