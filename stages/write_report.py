"""All that a run measured in; one self-contained page out: is each policy better, can one trust it.

Example: paste the line from logs/<run>/report.log
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import tyro

from stages.core.artifacts.files import write_text
from stages.core.artifacts.fingerprint import code_version
from stages.core.artifacts.judges import read_judge
from stages.core.artifacts.provenance import BASE
from stages.core.artifacts.schemas import (
    BREAKDOWN,
    HELD_OUT_CURVE,
    IMAGES,
    LEAKAGE,
    PREFERENCES,
    RELIABILITY,
    SUMMARY,
    TRAINING,
    Schema,
)
from stages.core.artifacts.tables import read_batches, read_metadata, read_table
from stages.core.errors import UserError
from stages.core.evaluation.gates import last_good, read_gate
from stages.core.evaluation.guards import GUARDS_TABLE, Limits, hardly_moved
from stages.core.evaluation.paper import read_paper_tables
from stages.core.evaluation.verdicts import Evaluation
from stages.core.execution.runtime import Run, log, run_stage, stage
from stages.core.report.figures import TrainingCurves
from stages.core.report.page import (
    breakdown_view,
    choose_shown,
    gates_view,
    guards_view,
    headline,
    judge_panels,
    leakage_view,
    metric_groups,
    others_view,
    pairs_view,
    paper_view,
    reliability_panels,
    render,
    training_panels,
)
from stages.core.report.thumbnails import Thumbnail, thumbnail

Row = dict[str, Any]

PAIR_COLUMNS = (
    "pair_id", "prompt", "source", "iteration", "winner_score", "loser_score", "margin",
    "margin_standard_error", "probability",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Args:
    """All that a run measured in, one self-contained page out."""

    run: str
    """Name of the run, for the title."""
    config: Path
    """What the run's configuration sets beyond the defaults (JSON)."""
    summary: Path
    """Paired comparisons of policies (schema evaluation_summary)."""
    breakdown: Path
    """Those within categories (schema evaluation_breakdown)."""
    guards: Path
    """Measures of each iteration (schema guards)."""
    reliability: Path
    """How right the judge is where it is how sure (schema reliability)."""
    judges: tuple[Path, ...] = ()
    """What each timestep counts in the rewards of policies 0, 1 ... (JSON); none where all count alike."""
    leakage: Path
    """Evaluation prompts that are trained on too (schema leakage)."""
    primary_metric: str
    """Metric whose verdicts head the page."""
    primary_set: str
    """Evaluation prompts whose verdicts head the page."""
    limits: Limits
    """Where a guard becomes a warning."""
    gates: tuple[Path, ...] = ()
    """What the guards decided after iterations 0, 1 ... (JSON); none with on_collapse warn."""
    paper_model: Literal["sd15", "sdxl"] | None = None
    """Show the paper's tables of this model beside the run's rows; None shows none."""
    images: tuple[Path, ...]
    """Images of one prompt set, one table per policy, in the order of --policies (schema images)."""
    policies: tuple[str, ...]
    """Names of the policies, in the order they were made: base iter00 iter01 ..."""
    pairs: tuple[Path, ...] = ()
    """Pairs of iterations 1, 2 ... (schema training_pairs or preferences); human ones are passed over."""
    training: tuple[tuple[int, Path], ...]
    """Iteration and the per-step measures of its training (schema training)."""
    held_out_curve: tuple[tuple[int, Path], ...] = ()
    """Iteration and the held-out measures of its training (schema held_out_curve)."""
    import_summary: Path
    """Counts of the human pairs that were read, dropped and kept (JSON)."""
    num_prompts_shown: int = 8
    """Prompts in the before-and-after grid, and pairs shown of each iteration."""
    output: Path
    """Where the page goes (HTML)."""


def main(args: Args) -> None:
    """Read everything, have it put into words and figures, and write the page."""
    check(args)
    with stage("write_report") as run:
        evaluation = read_evaluation(run, args)
        gates = [read_gate(path) for path in args.gates]
        config = read_object(args.config)
        guards = read(run, args.guards, GUARDS_TABLE).to_pylist()
        breakdown = read(run, args.breakdown, BREAKDOWN).to_pylist()
        paper = [row for row in read_paper_tables() if row.model == args.paper_model]
        first = headline(
            evaluation, args.primary_set, args.primary_metric, last_good(gates),
            hardly_moved(guards, args.limits),
        )  # fmt: skip
        first["sentences"] += where_it_lies(first["policy"], args)
        page = render(
            {
                "run": args.run,
                "primary_set": args.primary_set,
                "headline": first,
                "gates": gates_view(gates, config.get("iterations", len(args.pairs))),
                "metric_groups": metric_groups(evaluation, args.primary_set, args.primary_metric),
                "others": others_view(evaluation),
                "breakdown": breakdown_view(breakdown, evaluation),
                "paper_tables": paper_view(paper, evaluation, breakdown),
                **guards_view(sorted(guards, key=lambda row: int(row["iteration"])), args.limits),
                "reliability_panels": reliability_panels(
                    read(run, args.reliability, RELIABILITY).to_pylist()
                ),
                "judge_panels": judge_panels(
                    [(path.stem, read_judge(path)) for path in args.judges]
                ),
                "leakage": leakage_view(read(run, args.leakage, LEAKAGE).to_pylist()),
                "image_policies": args.policies,
                "image_rows": read_grid(run, args),
                "iteration_pairs": [read_pairs(run, path, args) for path in args.pairs],
                "training_panels": training_panels(read_training(run, args)),
                "import_summary": facts(read_object(args.import_summary)),
                "files": list(files(args)),
                "commands": commands(args),
                "config": json.dumps(config, indent=2, ensure_ascii=False),
                "code": code_version("stages.write_report"),
            }
        )
        write_text(args.output, page)
        run.rows_out = 1
        if first["overall"]:
            log.info("%s", first["overall"].sentence)
        log.info("write_report: %s, %.1f MB", args.output, len(page.encode()) / 1e6)


def where_it_lies(policy: str, args: Args) -> list[str]:
    """Where the weights of the policy that the headline is of are; nothing for one that was adopted."""
    folders = [path.parent / "policy" for _, path in args.training if path.parent.name == policy]
    return [
        f"The weights of {policy} lie in {folder}; the config's block export writes them for other tools."
        for folder in folders
    ]


def check(args: Args) -> None:
    """UserError for arguments that do not fit each other."""
    if len(args.images) != len(args.policies):
        raise UserError(
            f"--images names {len(args.images)} files and --policies {len(args.policies)} "
            "policies; give one file of images per policy, in the same order"
        )
    if not args.training:
        raise UserError("--training names no file; give those of iterations 0, 1 ...")
    if args.num_prompts_shown < 1:
        raise UserError(f"--num-prompts-shown must be at least 1, found {args.num_prompts_shown}")


def read(run: Run, path: Path, schema: Schema, columns: tuple[str, ...] | None = None) -> pa.Table:
    """A checked table, counted as rows in."""
    table = read_table(path, schema, columns)
    run.rows_in += len(table)
    return table


def read_evaluation(run: Run, args: Args) -> Evaluation:
    """The summary, known to compare every policy with base on the primary set and metric."""
    evaluation = Evaluation(read(run, args.summary, SUMMARY).to_pylist(), args.policies)
    for flag, wanted, found in (
        ("set", args.primary_set, evaluation.prompt_sets),
        ("metric", args.primary_metric, evaluation.metrics(args.primary_set)),
    ):
        if wanted not in found:
            raise UserError(
                f"--primary-{flag} {wanted!r} is not in {args.summary}; name one of what is "
                f"there: {', '.join(found) or 'nothing'}"
            )
    for policy in evaluation.policies:
        row = evaluation.against(args.primary_set, args.primary_metric, policy, BASE)
        if row is None and policy != BASE:
            raise UserError(
                f"{args.summary} does not compare {policy!r} with {BASE!r} on "
                f"{args.primary_metric} of {args.primary_set}. Make the summary anew."
            )
    return evaluation


def read_grid(run: Run, args: Args) -> list[Row]:
    """The first prompts with their image of each policy, known to start from the same noise."""
    columns = ("prompt_id", "prompt", "candidate", "seed")
    grid: list[Row] = []
    for path in args.images:
        table = read(run, path, IMAGES, columns)
        places = {
            row["prompt_id"]: (place, row)
            for place, row in enumerate(table.to_pylist())
            if row["candidate"] == 0
        }
        if not grid:
            first = list(places.values())[: args.num_prompts_shown]
            grid = [{**row, "images": []} for _, row in first]
        for row in grid:
            _place, found = places.get(row["prompt_id"], (-1, {"seed": None}))
            if found["seed"] != row["seed"]:
                raise UserError(
                    f"{path}: candidate 0 of prompt {row['prompt_id']} has seed {found['seed']}, "
                    f"in {args.images[0]} it has {row['seed']}. Sample the evaluation images of "
                    "all policies for the same prompts from the same seeds."
                )
        chosen = [places[row["prompt_id"]][0] for row in grid]
        for row, (image,) in zip(grid, read_images(path, IMAGES, ("image",), chosen), strict=True):
            row["images"].append(image)
    return grid


def read_pairs(run: Run, path: Path, args: Args) -> Row:
    """One iteration's generated pairs, with the images of those that are shown."""
    rows = read(run, path, PREFERENCES, PAIR_COLUMNS).to_pylist()
    generated = [place for place, row in enumerate(rows) if row["source"] == "generated"]
    if not generated:
        raise UserError(
            f"{path} holds no generated pair (column 'source' is never 'generated'); --pairs "
            "takes the pairs that iterations 1, 2 ... made"
        )
    pairs = [rows[place] for place in generated]
    shown = choose_shown(pairs, args.num_prompts_shown)
    places = [generated[i] for i in shown]
    images = read_images(path, PREFERENCES, ("winner", "loser"), places)
    return pairs_view(pairs, shown, [(winner, loser) for winner, loser in images])


def read_images(
    path: Path, schema: Schema, columns: tuple[str, ...], places: list[int]
) -> list[tuple[Thumbnail, ...]]:
    """The images in some rows of a table, column by column, ready for the page."""
    order = sorted(set(places))
    batches = read_batches(path, schema, columns, size=16, rows=order)
    rows = [row for batch in batches for row in batch.to_pylist()]
    by_place = dict(zip(order, rows, strict=True))
    return [
        tuple(
            thumbnail(by_place[place][name]["bytes"], f"{path}, row {place}, column {name!r}")
            for name in columns
        )
        for place in places
    ]


def read_training(run: Run, args: Args) -> list[TrainingCurves]:
    """What each training measured. UserError names one without steps."""
    curves = {
        i: read(run, path, HELD_OUT_CURVE, ("step", "accuracy", "log_loss"))
        for i, path in args.held_out_curve
    }
    found = []
    for iteration, path in args.training:
        table = read(run, path, TRAINING, ("loss", "implicit_accuracy"))
        if len(table) == 0:
            raise UserError(f"{path} has no steps. Run the training that writes it again.")
        loss, accuracy = (table.column(c).to_numpy() for c in ("loss", "implicit_accuracy"))
        curve = curves.get(iteration)
        steps, right, log_loss = (
            np.zeros(0) if curve is None else curve.column(name).to_numpy()
            for name in ("step", "accuracy", "log_loss")
        )
        found.append(
            TrainingCurves(
                iteration=iteration,
                loss=loss,
                accuracy=accuracy,
                held_out_steps=steps,
                held_out_accuracy=right,
                held_out_log_loss=log_loss,
            )
        )
    return found


def read_object(path: Path) -> Row:
    """The JSON object in a file; UserError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is no readable JSON file: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def facts(values: Row) -> dict[str, str]:
    """Names and values in words: 'rows read' and '12,000'."""
    return {
        key.replace("_", " "): f"{value:,}" if isinstance(value, int) else str(value)
        for key, value in values.items()
    }


def files(args: Args) -> Iterator[Row]:
    """Every file the page is made from, with the stage and the code version that made it."""
    policies, iterations = args.policies, range(len(args.pairs) + 1)
    tables = [
        (args.summary, "paired comparisons of all policies"),
        (args.breakdown, "the same by category"),
        (args.guards, "guards of each iteration"),
        (args.reliability, "how right the judge is where it is how sure"),
        (args.leakage, "evaluation prompts that are trained on"),
        *((path, f"images of {name}") for path, name in zip(args.images, policies, strict=True)),
        *(
            (path, f"pairs of iteration {i}")
            for path, i in zip(args.pairs, iterations[1:], strict=False)
        ),
        *((path, f"training of iteration {i}") for i, path in args.training),
    ]
    for path, holds in tables:
        made = read_metadata(path)
        yield {
            "path": path,
            "holds": holds,
            "stage": made.get("stage", "?"),
            "code": made.get("code", "?"),
        }
    for path in args.judges:
        yield {"path": path, "holds": f"weights of {path.stem} as a judge"}
    yield {"path": args.import_summary, "holds": "counts of the human pairs"}
    yield {"path": args.config, "holds": "configuration"}


def commands(args: Args) -> str:
    """What to type to make the run again, and to look into a table of pairs."""
    lines = [f"snakemake --cores all --configfile {shlex.quote(str(args.config))}"]
    if args.pairs:
        code = f"import pandas; print(pandas.read_parquet({str(args.pairs[-1])!r}))"
        lines.append(f"python -c {shlex.quote(code)}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
