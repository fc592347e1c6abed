"""What the runs of a laboratory measured: one row for each measure of each policy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stages.core.artifacts.schemas import SUMMARY
from stages.core.artifacts.tables import read_table
from stages.core.errors import UserError
from stages.core.evaluation.guards import GUARDS_TABLE
from stages.core.laboratory.calls import denoiser_calls
from stages.core.laboratory.experiments import Run
from stages.core.laboratory.memory import Measured, of_results
from stages.core.laboratory.verdicts import Values

Row = dict[str, Any]
FACTS = ("command", "commit", "machine", "run_seconds")
CALLS = "denoiser_calls"
"""The measure of what a policy cost, which follows from the config."""
GUARDS = ("reward_accuracy", "rank_correlation", "best_beats_worst", "diversity", "confident_share")
"""Guards that are measures of the laboratory; those of a judge stand in the iteration that it made."""


def rows_of(
    run: Run, results: Path, records: Path, begun: Path, earlier: Measured | None = None
) -> Iterator[Row]:
    """The rows of one run, for each experiment that looks at it; one without a value if it has not finished.

    What this lab has made comes before what was measured earlier.
    """
    facts: Row = dict.fromkeys(FACTS)
    measured: list[tuple[str | None, str | None, float | None]] = [(None, None, None)]
    status = "not finished" if (begun / run.name).exists() else "not begun"
    if found := made_here(run, results, records) or earlier:
        status = "finished"
        facts |= {name: getattr(found, name) for name in FACTS}
        measured = [
            (policy, measure, value)
            for policy, values in found.measures.items()
            for measure, value in values.items()
        ]
        calls = denoiser_calls(run.config)
        measured += [(name, CALLS, float(calls[name])) for name in found.measures if name in calls]
    for experiment, arm in run.used_by:
        for policy, measure, value in measured:
            yield {
                "run": run.name, "experiment": experiment, "arm": arm, "seed": run.seed,
                "status": status, "policy": policy, "measure": measure, "value": value, **facts,
            }  # fmt: skip


def made_here(run: Run, results: Path, records: Path) -> Measured | None:
    """What a finished run measured; None if it has not finished."""
    record = records / f"{run.name}.json"
    if not record.is_file():
        return None
    measures: dict[str, dict[str, float]] = {}
    for policy, measure, value in measures_of(results / run.name):
        measures.setdefault(policy, {})[measure] = value
    found = _read(record)
    return Measured(
        config=of_results(run.config),
        measures=measures,
        **{name: found.get(name) for name in FACTS},
    )


def _read(path: Path) -> Row:
    try:
        found: Row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is no record of a run ({error}); delete it and call snakemake lab again"
        ) from error
    return found


def measures_of(run: Path) -> Iterator[tuple[str, str, float]]:
    """(policy, measure, value) of a finished run: each metric's mean, and the guards."""
    means: dict[tuple[str, str], float] = {}
    for row in read_table(run / "evaluation" / "summary.parquet", SUMMARY).to_pylist():
        means[row["policy"], row["metric"]] = row["mean"]
        if "/" not in row["baseline"]:
            means[row["baseline"], row["metric"]] = row["baseline_mean"]
    for (policy, metric), value in sorted(means.items()):
        yield policy, metric, value
    for row in read_table(run / "evaluation" / "guards.parquet", GUARDS_TABLE).to_pylist():
        for name in GUARDS:
            if row.get(name) is not None:
                yield row["policy"], name, float(row[name])


def values_of(rows: Sequence[Row], experiment: str) -> Values:
    """The measured values of one experiment."""
    return {
        (row["arm"], row["seed"], row["policy"], row["measure"]): row["value"]
        for row in rows
        if row["experiment"] == experiment and row["value"] is not None
    }
