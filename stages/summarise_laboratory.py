r"""Runs of experiments in; one table of all that they measured, and a page with a verdict for each claim, out.

Example:
    python -m stages.summarise_laboratory --experiments config/lab/table6.yaml --base config/config.yaml \\
        --lab results/lab --results results --output results/lab/results.parquet --csv results/lab/results.csv \\
        --page docs/laboratory.md
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.csv
import tyro

from stages.core.artifacts.files import replacing, write_text
from stages.core.artifacts.schemas import LAB_RESULTS
from stages.core.artifacts.tables import write_table
from stages.core.execution.runtime import log, run_stage, stage
from stages.core.laboratory.experiments import (
    Experiment,
    chosen,
    plan_runs,
    read_base,
    read_experiment,
)
from stages.core.laboratory.figure import figure
from stages.core.laboratory.memory import as_text, found_in, read_memory, with_new
from stages.core.laboratory.page import page, picture
from stages.core.laboratory.results import made_here, rows_of, values_of


@dataclass(frozen=True, kw_only=True)
class Args:
    """Runs of experiments in, one table of all that they measured and a page with verdicts out."""

    experiments: tuple[Path, ...]
    """Files of config/lab/."""
    base: tuple[Path, ...]
    """The config that arms lie over, and others over it."""
    seeds: tuple[int, ...] = ()
    """Only these seeds; without, those of the experiments."""
    lab: Path
    """Folder of the records (runs/) and of the marks of runs that began (begun/)."""
    results: Path
    """Where runs lie."""
    output: Path
    """Where the table goes (schema lab_results)."""
    csv: Path
    """The same as CSV."""
    page: Path
    """Where the page goes (Markdown), with a figure for each experiment in images/ beside it."""
    earlier: Path | None = None
    """Runs that were measured before (JSON lines); without a file there are none."""
    memory: Path | None = None
    """Where the earlier runs go with those of this lab (JSON lines)."""


def main(args: Args) -> None:
    """Collect every run that was planned, finished or not, and judge the claims."""
    with stage("summarise_laboratory") as run:
        experiments = chosen([read_experiment(path) for path in args.experiments], args.seeds)
        runs = plan_runs(experiments, read_base(args.base))
        memory = read_memory(args.earlier) if args.earlier else []
        records_folder, begun = args.lab / "runs", args.lab / "begun"
        rows = [
            row
            for each in runs
            for row in rows_of(each, args.results, records_folder, begun, found_in(memory, each))
        ]
        new = {
            each.name: (each, made)
            for each in runs
            if (made := made_here(each, args.results, records_folder))
        }
        records = [records_folder / f"{each.name}.json" for each in runs]
        table = write_table(
            args.output, rows, LAB_RESULTS, stage="summarise_laboratory", arguments=args,
            inputs=[
                *args.experiments, *args.base, *filter(Path.is_file, records),
                *([args.earlier] if args.earlier and args.earlier.is_file() else []),
            ],
        )  # fmt: skip
        with replacing(args.csv) as part:
            pyarrow.csv.write_csv(table, part)
        if args.memory:
            write_text(args.memory, as_text(with_new(memory, new)))
        drawn = draw_figures(experiments, rows, args.page)
        write_text(args.page, page(experiments, rows, drawn))
        finished = len({row["run"] for row in rows if row["status"] == "finished"})
        log.info("summarise_laboratory: %d of %d runs have finished", finished, len(runs))
        run.rows_in, run.rows_out = len(runs), len(rows)


def draw_figures(
    experiments: Sequence[Experiment], rows: Sequence[dict[str, Any]], beside: Path
) -> set[str]:
    """Write the figure of each experiment that has measured something; their names."""
    drawn = set[str]()
    for experiment in experiments:
        if svg := figure(experiment, values_of(rows, experiment.name)):
            path = beside.parent / picture(experiment)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                part.write_bytes(svg)
            drawn.add(experiment.name)
    return drawn


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
