"""The report's page: rows of the tables put into words, cells and figures, and the template filled."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stages.core.artifacts.judges import JudgeRecord
from stages.core.artifacts.provenance import BASE
from stages.core.evaluation.gates import Gate, gate_sentences, last_good
from stages.core.evaluation.guard import Measured
from stages.core.evaluation.paper import TOLERANCE, Column, PaperRow
from stages.core.evaluation.statistics import ReliabilityBin
from stages.core.evaluation.verdicts import (
    LABELS,
    Evaluation,
    SummaryRow,
    Verdict,
    best_sentence,
    sides_sentence,
    steps_sentence,
    verdict,
)
from stages.core.evaluation.wording import DASH, number, p_value, percent
from stages.core.report.figures import (
    LN_2,
    Series,
    TrainingCurves,
    reliability_panel,
    series_panel,
    training_panel,
)
from stages.core.report.looks import MOST_PICTURES
from stages.core.report.metric_words import METRICS
from stages.core.report.panels import Panel

Row = dict[str, Any]
Steps = Float[np.ndarray, " step"]

TEMPLATE = Path(__file__).with_name("report.html.jinja")
STYLE = Path(__file__).with_name("report.css.jinja")
MARKS = {"higher": "▲", "lower": "▼", "small": "◇", "unclear": "◆"}
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}


def render(context: Mapping[str, Any]) -> str:
    """The page; every text in the context is escaped, save the figures' own markup.

    Its content policy allows one style sheet by its digest, pictures that it holds, and nothing else.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = environment.get_template(STYLE.name).render(most_pictures=MOST_PICTURES)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return environment.get_template(TEMPLATE.name).render(
        marks=MARKS,
        labels=LABELS,
        most_pictures=MOST_PICTURES,
        style_digest=f"'sha256-{digest}'",
        **context,
    )


def _visible(value: object) -> object:
    """A text with its control characters, which no page can hold, as their pictures: NUL as ␀."""
    return value.translate(PICTURES) if type(value) is str else value


def headline(
    evaluation: Evaluation,
    prompt_set: str,
    metric: str,
    good: str | None = None,
    hardly_moved: Mapping[str, str] = MappingProxyType({}),
) -> Row:
    """Verdicts on one metric: the last policy against base, then each against the one before.

    Where gates found a last good policy, it stands in the last one's place. Where that hardly moved
    from the base, the sentence that says so comes first.
    """
    policies, decimals = evaluation.policies, evaluation.decimals(prompt_set, metric)
    last = good if good and good != BASE else policies[-1]
    overall = evaluation.against(prompt_set, metric, last, BASE)
    steps = _present(
        evaluation.against(prompt_set, metric, policy, evaluation.previous(policy))
        for policy in policies
    )
    others = _present(
        evaluation.against(prompt_set, other, last, BASE)
        for other in evaluation.metrics(prompt_set)
        if other != metric
    )
    first = overall and verdict(overall, decimals)
    sentences = (
        first.sentence if first and last in hardly_moved else "",
        steps_sentence(steps),
        sides_sentence(others),
        best_sentence(evaluation, prompt_set, metric),
    )
    return {
        "policy": last,
        "overall": Verdict(direction="small", sentence=hardly_moved[last])
        if last in hardly_moved
        else first,
        "steps": [verdict(step, decimals) for step in steps],
        "sentences": [sentence for sentence in sentences if sentence],
    }


def metric_groups(evaluation: Evaluation, first_set: str, first_metric: str) -> list[Row]:
    """For each prompt set, a curve and the table rows of each metric; the first ones lead.

    The curve of the first metric on the first set is not among them: it stands at the page's head.
    """
    groups = []
    for prompt_set in sorted(evaluation.prompt_sets, key=lambda name: name != first_set):
        metrics = sorted(evaluation.metrics(prompt_set), key=lambda name: name != first_metric)
        tables = [
            {
                "metric": metric,
                "meaning": METRICS.get(metric, ""),
                "num_prompts": num_prompts(evaluation, prompt_set, metric),
                "policies": [
                    metric_row(evaluation, prompt_set, metric, policy)
                    for policy in evaluation.policies
                ],
            }
            for metric in metrics
        ]
        curves = [
            replace(metric_panel(evaluation, prompt_set, metric), caption="")  # the table explains
            for metric in metrics
            if (prompt_set, metric) != (first_set, first_metric)
        ]
        groups.append({"prompt_set": prompt_set, "curves": curves, "metrics": tables})
    return groups


def num_prompts(evaluation: Evaluation, prompt_set: str, metric: str) -> str:
    """'200 prompts', or '180 to 200 prompts' where policies differ; empty where nothing was compared."""
    counts = [
        row.num_prompts
        for row in _present(
            evaluation.against(prompt_set, metric, policy, BASE) for policy in evaluation.policies
        )
    ]
    if not counts:
        return ""
    low, high = min(counts), max(counts)
    return f"{low:,} prompts" if low == high else f"{low:,} to {high:,} prompts"


def metric_row(evaluation: Evaluation, prompt_set: str, metric: str, policy: str) -> Row:
    """A policy's mean on a metric, its differences to base and to the one before, its wins."""
    decimals = evaluation.decimals(prompt_set, metric)
    base = evaluation.against(prompt_set, metric, policy, BASE)
    previous = evaluation.against(prompt_set, metric, policy, evaluation.previous(policy))
    return {
        "policy": policy,
        "mean": number(evaluation.mean(prompt_set, metric, policy), decimals),
        "base": difference_cell(base, decimals),
        "previous": difference_cell(previous, decimals),
        "wins": wins_cell(base),
        "effect_size": number(base.effect_size, 2, sign=True) if base else DASH,
        "p": p_value(base.wilcoxon_p_holm) if base else DASH,
    }


def wins_cell(row: SummaryRow | None) -> Row | None:
    """A win rate with its interval; None where nothing was compared."""
    if row is None:
        return None
    low, high = (number(100 * end, 0) for end in (row.win_low, row.win_high))
    return {"share": percent(row.win_rate), "interval": f"{low} to {high} %"}


def others_view(evaluation: Evaluation) -> list[Row]:
    """Own policies against those of other runs: one row a set, metric and pair."""
    return [
        {
            "prompt_set": prompt_set,
            "metric": metric,
            "policy": policy,
            "other": other,
            "difference": difference_cell(row, evaluation.decimals(prompt_set, metric)),
            "wins": wins_cell(row),
            "p": p_value(row.wilcoxon_p_holm),
        }
        for other in evaluation.others
        for prompt_set in evaluation.prompt_sets
        for metric in evaluation.metrics(prompt_set)
        for policy in evaluation.policies
        if (row := evaluation.against(prompt_set, metric, policy, other)) is not None
    ]


def breakdown_view(rows: Sequence[Row], evaluation: Evaluation) -> list[Row]:
    """For each set, axis and metric, how the last policy compares with base in each group."""
    last = evaluation.policies[-1]
    tables: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row["policy"] != last or row["baseline"] != BASE:
            continue
        decimals = evaluation.decimals(row["prompt_set"], row["metric"])
        ends = (number(row[name], decimals, sign=True) for name in ("ci_low", "ci_high"))
        tables.setdefault((row["prompt_set"], row["axis"], row["metric"]), []).append(
            {
                "group": row["group"],
                "num_prompts": row["num_prompts"],
                "base": number(row["baseline_mean"], decimals),
                "last": number(row["mean"], decimals),
                "difference": number(row["difference"], decimals, sign=True),
                "interval": " to ".join(ends),
                "win_rate": percent(row["win_rate"]),
            }
        )
    return [
        {"prompt_set": name, "axis": axis, "metric": metric, "policy": last, "rows": found}
        for (name, axis, metric), found in tables.items()
    ]


def paper_view(
    paper: Sequence[PaperRow], evaluation: Evaluation, breakdown: Sequence[Row]
) -> list[Row]:
    """Each of the paper's tables with what the run has of it; those it has nothing of are left out.

    Base and its distance from the paper's base lead, then come the run's policies and the paper's
    rows.
    """
    means: dict[Column, dict[str, float]] = {}
    for row in breakdown:
        column = Column(row["prompt_set"], row["metric"], row["group"])
        means.setdefault(column, {})[row["policy"]] = row["mean"]
    for prompt_set in evaluation.prompt_sets:
        for metric in evaluation.metrics(prompt_set):
            found = {p: evaluation.mean(prompt_set, metric, p) for p in evaluation.policies}
            means[Column(prompt_set, metric)] = {p: m for p, m in found.items() if m is not None}
    views = []
    for table in dict.fromkeys(row.table for row in paper):
        rows = [row for row in paper if row.table == table]
        columns = [column for column in rows[0].values if column in means]
        if columns:
            views.append(paper_table(table, rows, columns, means, evaluation.policies))
    return views


def paper_table(
    table: int,
    paper: Sequence[PaperRow],
    columns: Sequence[Column],
    means: Mapping[Column, Mapping[str, float]],
    policies: Sequence[str],
) -> Row:
    """One of the paper's tables beside this run's rows, and whether the two bases agree."""
    base = paper[0].values
    gaps = {column: means[column][BASE] - base[column] for column in columns}
    far = [c for c in columns if abs(gaps[c]) > TOLERANCE.get(c.metric, float("inf"))]
    decimals = {column: 4 if column.metric == "imagereward" else 2 for column in columns}

    def row(name: str, values: Mapping[Column, float], *, sign: bool = False) -> Row:
        cells = [number(values[column], decimals[column], sign=sign) for column in columns]
        return {"name": name, "cells": cells}

    difference = row("difference of base from the paper's", gaps, sign=True)
    difference["cells"] = [
        f"{cell} ⚠" if column in far else cell
        for column, cell in zip(columns, difference["cells"], strict=True)
    ]
    own = [
        row(f"{policy} (this run)", {column: means[column][policy] for column in columns})
        for policy in policies
    ]
    own.insert(1, difference)
    others = []
    for line in paper:
        printed = f" (printed as {line.printed_as})" if line.printed_as else ""
        others.append(row(f"paper: {line.method}{printed}", line.values))
    return {
        "table": table,
        "columns": [" ".join(filter(None, (c.prompt_set, c.category, c.metric))) for c in columns],
        "rows": own + others,
        "is_far": bool(far),
    }


def leakage_view(rows: Sequence[Row]) -> list[Row]:
    """How many prompts of each evaluation set each training saw."""
    return [{**row, "is_shared": row["num_shared"] > 0} for row in rows]


def reliability_panels(rows: Sequence[Row]) -> list[Panel]:
    """The judge's reliability in each iteration."""
    panels = []
    for iteration in dict.fromkeys(row["iteration"] for row in rows):
        inside = [row for row in rows if row["iteration"] == iteration]
        names = ("num_pairs", "mean_probability", "share_right", "share_low", "share_high")
        bins = [ReliabilityBin(**{name: row[name] for name in names}) for row in inside]
        title = f"Reliability of {inside[0]['policy']}"
        caption = f"{sum(part.num_pairs for part in bins)} held-out pairs in bins of equal size"
        panels.append(Panel(title, reliability_panel(title, bins), caption))
    return panels


def judge_panels(records: Sequence[tuple[str, JudgeRecord]]) -> list[Panel]:
    """What each timestep counts in the reward of each policy, and what that is worth."""
    panels = []
    for policy, record in records:
        title = f"Weights of {policy}"
        edges = np.linspace(0, record.num_timesteps, len(record.weights) + 1)
        series = Series(
            name=title,
            labels=[f"{edge:.0f}" for edge in edges[:-1]],
            values=record.weights,
            line=1.0,
            line_label="equal weights",
        )
        right = f"{percent(record.accuracy)} of {record.num_pairs} held-out pairs right"
        if record.plain_accuracy is None or record.log_loss is None:
            caption = f"Too few pairs to fit; {right}."
        else:
            caption = (
                f"By weights that did not see a pair's prompt: {right} (with equal weights "
                f"{percent(record.plain_accuracy)}), log-loss {number(record.log_loss, 3)} "
                f"({number(record.plain_log_loss or 0.0, 3)}; a coin has 0.693)."
            )
        panels.append(Panel(title, series_panel(series), caption))
    return panels


def difference_cell(row: SummaryRow | None, decimals: int) -> Row | None:
    """A difference with its interval and direction; None where nothing was compared."""
    if row is None:
        return None
    return {
        "direction": row.direction,
        "difference": number(row.difference, decimals, sign=True),
        "low": number(row.ci_low, decimals, sign=True),
        "high": number(row.ci_high, decimals, sign=True),
    }


def metric_panel(
    evaluation: Evaluation, prompt_set: str, metric: str, size: tuple[float, float] = (3.4, 2.1)
) -> Panel:
    """The curve of a metric: means, and around them the intervals of the difference to base.

    Paper: SAIL Fig. 2.
    """
    policies = evaluation.policies
    rows = [evaluation.against(prompt_set, metric, policy, BASE) for policy in policies]
    series = Series(
        name=f"{metric} ({prompt_set})",
        labels=policies,
        values=[evaluation.mean(prompt_set, metric, policy) for policy in policies],
        intervals=[
            (row.baseline_mean + row.ci_low, row.baseline_mean + row.ci_high) if row else None
            for row in rows
        ],
        line=evaluation.mean(prompt_set, metric, BASE),
        line_label=BASE,
    )
    meaning = METRICS.get(metric, "")
    return Panel(metric, series_panel(series, size), f"{metric}: {meaning}." if meaning else "")


def accuracy_panel(rows: Sequence[Measured], size: tuple[float, float]) -> Panel:
    """How often each policy judges held-out pairs as people did."""
    series = Series(
        name="Reward accuracy",
        labels=[row["policy"] for row in rows],
        values=[row["reward_accuracy"] for row in rows],
        intervals=[(row["reward_accuracy_low"], row["reward_accuracy_high"]) for row in rows],
        line=0.5,
        line_label="chance",
        is_share=True,
    )
    return Panel("The judge: held-out pairs ranked as people do", series_panel(series, size), "")


def gates_view(gates: Sequence[Gate], iterations: int) -> Row | None:
    """What the guards decided, of so many iterations that were asked for; None without gates."""
    if not gates:
        return None
    return {
        "on_collapse": gates[-1].on_collapse,
        "is_stopped": gates[-1].stops,
        "sentences": gate_sentences(gates, iterations),
        "last_good": last_good(gates),
    }


def training_panels(trainings: Sequence[TrainingCurves]) -> list[Panel]:
    """Loss and accuracies of each iteration's training, all on one scale."""
    losses = [curves.loss for curves in trainings]
    finite = np.concatenate([loss[np.isfinite(loss)] for loss in losses] + [np.array([LN_2])])
    low, high = np.quantile(finite, (0.002, 0.998))
    low, high = min(low, LN_2), max(high, LN_2)
    margin = 0.08 * (high - low) or 0.1
    panels = []
    for curves in trainings:
        title = f"Iteration {curves.iteration}" + (
            " (people's pairs)" if curves.iteration == 0 else ""
        )
        svg = training_panel(title, curves, (low - margin, high + margin))
        panels.append(Panel(title, svg, f"{len(curves.loss)} steps"))
    return panels


def _present(rows: Iterable[SummaryRow | None]) -> list[SummaryRow]:
    return [row for row in rows if row is not None]
