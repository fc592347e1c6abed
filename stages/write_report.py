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
    LEAKAGE,
    LIKES,
    RELIABILITY,
    SUMMARY,
    TRAINING,
    Schema,
)
from stages.core.artifacts.tables import holds, read_metadata, read_table
from stages.core.artifacts.timings import Timings, read_timings
from stages.core.errors import UserError
from stages.core.evaluation.gates import read_gate
from stages.core.evaluation.guards import GUARDS_TABLE, Limits, hardly_moved
from stages.core.evaluation.paper import read_paper_tables
from stages.core.evaluation.verdicts import Evaluation
from stages.core.execution.run_record import read_made_with
from stages.core.execution.runtime import Run, log, run_stage, stage
from stages.core.report.advice import advise, judge_trend
from stages.core.report.data_words import data_sentences
from stages.core.report.figures import TrainingCurves
from stages.core.report.guard_rows import guards_view
from stages.core.report.page import (
    accuracy_panel,
    breakdown_view,
    gates_view,
    headline,
    judge_panels,
    leakage_view,
    metric_groups,
    metric_panel,
    others_view,
    paper_view,
    reliability_panels,
    render,
    training_panels,
)
from stages.core.report.run_facts import run_facts
from stages.core.report.shown import PictureFiles, ShownPictures

Row = dict[str, Any]

HEAD_SIZE = (4.8, 2.3)
"""Inches of the two figures at the head of the page."""


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
    images: tuple[tuple[str, Path], ...]
    """Policy and images of the primary set, a row for each shard (schema images)."""
    scores: tuple[tuple[str, Path], ...]
    """Policy and scores of these images by the primary metric (schema metric_scores)."""
    policies: tuple[str, ...]
    """Names of the policies, in the order they were made: base iter00 iter01 ..."""
    pairs: tuple[Path, ...] = ()
    """Pairs of iterations 1, 2 ... (schema training_pairs or preferences); human ones are passed over."""
    training: tuple[tuple[int, Path], ...]
    """Iteration and the per-step measures of its training (schema training)."""
    held_out_curve: tuple[tuple[int, Path], ...] = ()
    """Iteration and the held-out measures of its training (schema held_out_curve)."""
    preferences: Path
    """Human pairs that were trained on (schema preferences), or single likes (schema likes)."""
    holdout: Path
    """Human pairs that were held out (schema preferences), or likes side by side (schema liked_pairs)."""
    judged: tuple[tuple[str, Path], ...] = ()
    """Policy and what it makes of the held-out pairs (schema holdout_rewards)."""
    import_summary: Path
    """Counts of the human pairs that were read, dropped and kept (JSON)."""
    logs: Path | None = None
    """Folder of the run's logs, whose timing tables tell how long the jobs took; None tells no time."""
    record: Path | None = None
    """What the last call of Snakemake wrote of its code's commit and versions (JSON)."""
    training_gpus: int = 1
    """GPUs that a training took, for the device hours."""
    num_prompts_shown: int = 8
    """Prompts below those at the page's head."""
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
        guards.sort(key=lambda row: int(row["iteration"]))
        breakdown = read(run, args.breakdown, BREAKDOWN).to_pylist()
        paper = [row for row in read_paper_tables() if row.model == args.paper_model]
        primary = (args.primary_set, args.primary_metric)
        advice = advise(evaluation, *primary, guards, args.limits, gates)
        first = headline(
            evaluation, *primary, None if advice.policy == BASE else advice.policy,
            hardly_moved(guards, args.limits),
        )  # fmt: skip
        first["sentences"] += where_it_lies(first["policy"], args)
        shown = choose_pictures(args, first["policy"], evaluation.decimals(*primary))
        imported = read_object(args.import_summary)
        iteration_pairs = shown.iteration_pairs()
        page = render(
            {
                "run": args.run,
                "primary_set": args.primary_set,
                "primary_metric": args.primary_metric,
                "facts": run_facts(
                    config=config,
                    counts=imported,
                    sizes=iteration_pairs,
                    evaluated=shown.evaluated(args.primary_set),
                    timings=timings_of(args),
                    training_gpus=args.training_gpus,
                    made_with=read_made_with(args.record),
                ),
                "advice": advice,
                "headline": first,
                "curve": metric_panel(evaluation, *primary, HEAD_SIZE),
                "judge_curve": accuracy_panel(guards, HEAD_SIZE),
                "judge_trend": judge_trend(guards),
                "gates": gates_view(gates, config.get("iterations", len(args.pairs))),
                "metric_groups": metric_groups(evaluation, *primary),
                "others": others_view(evaluation),
                "breakdown": breakdown_view(breakdown, evaluation),
                "paper_tables": paper_view(paper, evaluation, breakdown),
                **guards_view(guards, args.limits),
                "reliability_panels": reliability_panels(
                    read(run, args.reliability, RELIABILITY).to_pylist()
                ),
                "judge_panels": judge_panels(
                    [(path.stem, read_judge(path)) for path in args.judges]
                ),
                "leakage": leakage_view(read(run, args.leakage, LEAKAGE).to_pylist()),
                **shown.prompts(),
                **shown.changes(),
                "iteration_pairs": iteration_pairs,
                "human": shown.human(),
                **human_heading(args.preferences),
                "wrong": shown.wrong(),
                "training_panels": training_panels(read_training(run, args)),
                "import_sentences": data_sentences(imported),
                "files": list(files(args)),
                "commands": commands(args),
                "config": json.dumps(config, indent=2, ensure_ascii=False),
                "code": code_version("stages.write_report"),
            }
        )
        write_text(args.output, page)
        run.rows_in += shown.num_rows
        run.rows_out = 1
        if first["overall"]:
            log.info("%s", first["overall"].sentence)
        log.info("write_report: %s, %.1f MB", args.output, len(page.encode()) / 1e6)


def human_heading(preferences: Path) -> Row:
    """What stands above the human labels, where these are no pairs."""
    if not holds(preferences, LIKES):
        return {}
    return {"human_heading": "Single likes that were trained on"}


def where_it_lies(policy: str, args: Args) -> list[str]:
    """Where the weights of the policy that the headline is of are; nothing for one that was adopted."""
    folders = [path.parent / "policy" for _, path in args.training if path.parent.name == policy]
    return [
        f"The weights of {policy} lie in {folder}; the config's block export writes them for other tools."
        for folder in folders
    ]


def check(args: Args) -> None:
    """UserError for arguments that do not fit each other."""
    for flag, named in (("images", args.images), ("scores", args.scores)):
        names = list(dict.fromkeys(policy for policy, _ in named))
        if sorted(names) != sorted(args.policies):
            raise UserError(
                f"--{flag} names files of {', '.join(names) or 'no policy'}, and --policies "
                f"{', '.join(args.policies) or 'no policy'}; give each policy's files, and no others"
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


def choose_pictures(args: Args, policy: str, decimals: int) -> ShownPictures:
    """What the page shows of pictures, base beside this policy."""
    return ShownPictures(
        files=PictureFiles(
            images=args.images,
            scores=args.scores,
            pairs=args.pairs,
            preferences=args.preferences,
            holdout=args.holdout,
            judged=args.judged,
        ),
        policies=args.policies,
        policy=policy,
        num_prompts=args.num_prompts_shown,
        decimals=decimals,
    )


def timings_of(args: Args) -> Timings:
    """How long the run's jobs took; the log names timing tables that tell nothing."""
    timings = read_timings(args.logs) if args.logs else Timings(jobs=(), unreadable=())
    for path in timings.unreadable:
        log.warning("%s is no readable timing table; its job is not among the hours", path)
    return timings


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


def files(args: Args) -> Iterator[Row]:
    """Every file the page is made from, with the stage and the code version that made it."""
    iterations = range(len(args.pairs) + 1)
    tables = [
        (args.summary, "paired comparisons of all policies"),
        (args.breakdown, "the same by category"),
        (args.guards, "guards of each iteration"),
        (args.reliability, "how right the judge is where it is how sure"),
        (args.leakage, "evaluation prompts that are trained on"),
        *((path, f"images of {name}") for name, path in args.images),
        *((path, f"scores of {name}") for name, path in args.scores),
        (args.preferences, "human labels that were trained on"),
        (args.holdout, "human labels that were held out"),
        *((path, f"held-out pairs as {name} judges them") for name, path in args.judged),
        *(
            (path, f"pairs of iteration {i}")
            for path, i in zip(args.pairs, iterations[1:], strict=False)
        ),
        *((path, f"training of iteration {i}") for i, path in args.training),
    ]
    for path, content in tables:
        made = read_metadata(path)
        yield {
            "path": path,
            "holds": content,
            "stage": made.get("stage", "?"),
            "code": made.get("code", "?"),
        }
    for path in args.judges:
        yield {"path": path, "holds": f"weights of {path.stem} as a judge"}
    yield {"path": args.import_summary, "holds": "counts of the human labels"}
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
