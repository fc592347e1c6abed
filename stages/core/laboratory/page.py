"""The page of the laboratory: for each claim a verdict with its numbers, for each arm what it measured."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

import numpy as np

from stages.core.laboratory.experiments import MIN_SEEDS, Experiment
from stages.core.laboratory.results import CALLS, values_of
from stages.core.laboratory.verdicts import Compared, Values, interval, judge

Row = dict[str, Any]
SHOWN = (
    "total", "caption_match", "appeal", "reward_accuracy", "rank_correlation", "diversity", CALLS,
)  # fmt: skip
"""Measures of the tables, where they were taken."""

HEAD = f"""# The laboratory: the paper's claims over seeds, where the truth is known

    snakemake --cores all lab                                                            # all of it
    snakemake --cores all --snakefile workflow/lab/Snakefile --config only=table6 seeds=1,2   # a part

Written by `stages.summarise_laboratory` from `results/lab/results.parquet`; `results.csv` beside it says the same. Each
experiment is a file of `config/lab/`: arms that lie over `config/config.yaml`. Runs that are equal are made once, and
runs whose policy 0 would be equal share it. A lab that is stopped goes on where it was. Runs of
`config/lab/measured.jsonl` were made before, by the commits named below, and are not made again; `earlier=""` makes
them all. What a lab adds lies in `results/lab/measured.jsonl`, to be put in its place. The seed is the unit: arms are
paired by it, and intervals are 95 % bootstrap intervals of the mean over seeds. A claim wants {MIN_SEEDS} seeds. It
*holds* if the interval of each of its comparisons is above 0, and *holds in part* if some are. With five seeds such
an interval is too narrow: it leaves out 0 whenever all five differences have one sign, which chance does once in 16.
`denoiser_calls` are the rows that went through a denoiser until a policy was made, by the config: trainings, candidates,
rewards, and held-out rewards where a judge's weights are fitted to them; not the evaluation.
"""


def picture(experiment: Experiment) -> str:
    """Where the page looks for an experiment's figure, beside itself."""
    return f"images/laboratory-{experiment.name}.svg"


def page(experiments: Sequence[Experiment], rows: Sequence[Row], drawn: Container[str] = ()) -> str:
    """The whole page in Markdown; `drawn` are the experiments that have a figure."""
    parts = [HEAD, overview(experiments, rows)]
    for experiment in experiments:
        values = values_of(rows, experiment.name)
        parts += [f"## {experiment.title}\n", f"{experiment.source}\n"]
        if experiment.name in drawn:
            by = "policy" if experiment.by == "policy" else "calls of the denoiser"
            parts.append(f"![{experiment.title}: each arm by {by}]({picture(experiment)})\n")
        parts += [claims_table(experiment, values), arms_table(experiment, values)]
        parts.append(runs_line(experiment, rows))
    return "\n".join(parts)


def overview(experiments: Sequence[Experiment], rows: Sequence[Row]) -> str:
    """All claims with their verdicts, and what to set."""
    lines = ["| claim | verdict | what to set |", "|---|---|---|"]
    for experiment in experiments:
        values = values_of(rows, experiment.name)
        for claim in experiment.claims:
            verdict, _ = judge(claim, values)
            advice = claim.advice if verdict == "holds" else ""
            lines.append(f"| {claim.says} | {verdict} | {advice} |")
    return "\n".join(lines) + "\n"


def claims_table(experiment: Experiment, values: Values) -> str:
    """Each claim's comparisons with their intervals."""
    lines = [
        "| claim | measure | left | right | left - right [95 %] | seeds | each seed |",
        "|---|---|---|---|---|---|---|",
    ]
    for claim in experiment.claims:
        verdict, found = judge(claim, values)
        lines += [f"| {claim.says}: **{verdict}** | {cells(each)} |" for each in found]
    return "\n".join(lines) + "\n"


def cells(found: Compared) -> str:
    """A comparison in the table's cells."""
    each = ", ".join(f"{value:+.3f}" for value in found.differences)
    gap = "-"
    if found.differences:
        gap = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    return f"{found.measure} | {found.left} | {found.right} | {gap} | {len(found.differences)} | {each}"


def arms_table(experiment: Experiment, values: Values) -> str:
    """The mean over seeds of each measure, by arm and policy, with its interval."""
    measures = [name for name in SHOWN if any(key[3] == name for key in values)]
    if not measures:
        return "No run has finished yet.\n"
    lines = [f"| arm | policy | {' | '.join(measures)} |", "|" + "---|" * (len(measures) + 2)]
    for arm in experiment.arms:
        policies = sorted({p for a, _, p, _ in values if a == arm}, key=lambda p: (p != "base", p))
        for policy in policies:
            found = [
                [v for (a, _, p, m), v in values.items() if (a, p, m) == (arm, policy, measure)]
                for measure in measures
            ]
            texts = [
                mean_text(each, 0 if measure == CALLS else 3)
                for each, measure in zip(found, measures, strict=True)
            ]
            lines.append(f"| {arm} | {policy} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def mean_text(values: Sequence[float], places: int = 3) -> str:
    """A mean over seeds with its interval, without one where all are equal whole numbers; a dash for none."""
    if not values:
        return "-"
    if not places and len(set(values)) == 1:
        return f"{values[0]:,.0f}"
    low, high = interval(values)
    return f"{np.mean(values):,.{places}f} [{low:,.{places}f}, {high:,.{places}f}]"


def runs_line(experiment: Experiment, rows: Sequence[Row]) -> str:
    """How many runs there are, and those that did not finish."""
    status = {row["run"]: row["status"] for row in rows if row["experiment"] == experiment.name}
    counts = {
        name: sum(s == name for s in status.values()) for name in dict.fromkeys(status.values())
    }
    text = ", ".join(f"{number} {name}" for name, number in counts.items())
    commits = sorted({str(row["commit"])[:12] for row in rows
                      if row["experiment"] == experiment.name and row["commit"]})  # fmt: skip
    machines = sorted({row["machine"] for row in rows
                       if row["experiment"] == experiment.name and row["machine"]})  # fmt: skip
    text = f"Runs: {text}."
    if commits:
        text += f" Commits: {', '.join(commits)}. Machines: {'; '.join(machines)}."
    open_runs = [name for name, s in status.items() if s == "not finished"]
    return text + (f" Not finished: {', '.join(open_runs)}." if open_runs else "") + "\n"
