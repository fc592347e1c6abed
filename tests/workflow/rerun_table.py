"""What a user changes in a finished run, and what reruns: the rows of docs/reruns.md, each one a test.

python -m tests.workflow.rerun_table           writes the table into the page
python -m tests.workflow.rerun_table --check   says whether the page is in step
"""

from __future__ import annotations

import base64
import os
import random
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from stages.core.artifacts.decisions import image_digest
from stages.core.artifacts.schemas import PREFERENCES
from stages.core.artifacts.tables import read_table
from stages.core.audit.desk import Desk, journal_of
from stages.core.pages.journal import Journal
from tests.workflow.plans import Job
from tests.workflow.projects import ROOT, RUN, Project

PAGE = ROOT / "docs" / "reruns.md"
BEGIN, END = "<!-- rows: python -m tests.workflow.rerun_table -->", "<!-- end of rows -->"

Edit = Callable[[Project, Path], Project]
EVERYTHING = ("everything",)
LAST = ("write_report", "write_model_cards", "export_preferences")
"""Rules whose files no other reads."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: a change, and the jobs that it reruns."""

    section: str
    change: str
    """In the words of the page."""
    begins: tuple[str, ...] = ()
    """Rules whose jobs rerun, as `rule` or `rule (part of an output's path)`; all that reads what
    they make follows."""
    note: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Laid over the config of the finished run."""
    edit: Edit | None = None
    """Makes the changed project in a folder, from the finished one."""
    flags: tuple[str, ...] = ()
    """Of the command line."""
    is_own: bool = False
    """Whether the run is one on files of the user's own instead of the embedded world."""
    reshapes: bool = False
    """Whether other jobs than those of the finished run are planned."""

    def starts(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs among those of a whole run that begin; each pattern must name some."""
        if self.begins == EVERYTHING:
            return list(jobs)
        found = []
        for begin in self.begins:
            rule, _, part = begin.rstrip(")").partition(" (")
            named = [
                job for job in jobs if job.rule == rule and any(part in o for o in job.outputs)
            ]
            assert named, f"no job is {begin!r}"
            found += named
        return found

    def line(self) -> str:
        """The row in Markdown."""
        begins = ", ".join(
            f"`{b.replace(' (', '` (') if ' (' in b else b + '`'}" for b in self.begins
        )
        if self.begins == EVERYTHING:
            begins = "everything"
        elif begins:
            is_last = all(begin.split(" ")[0] in LAST for begin in self.begins)
            begins += "" if is_last else ", and what follows"
        text = begins or "nothing"
        return f"| {self.change} | {text}{'; ' + self.note if self.note else ''} |"


def code(edit: Callable[[Path], None]) -> Edit:
    """A copy of the code, edited; results as they are."""

    def change(project: Project, folder: Path) -> Project:
        root = folder / "code"
        pipeline = ROOT / "stages" / "shapes" / "pipeline"
        for name in ("stages", "workflow", "profiles", "envs"):
            ignore = shutil.ignore_patterns("__pycache__", "pipeline")
            shutil.copytree(ROOT / name, root / name, ignore=ignore)
        shutil.copy(ROOT / "Snakefile", root)
        (root / "stages" / "shapes" / "pipeline").symlink_to(pipeline)
        edit(root)
        return Project(project.folder, root)

    return change


def files(edit: Callable[[Path], None]) -> Edit:
    """A copy of the project's folder, edited."""

    def change(project: Project, folder: Path) -> Project:
        copied = project.copy(folder / "copy")
        edit(copied.folder)
        return copied

    return change


def remarks(*names: str) -> Edit:
    """Comments, docstrings and layout of some modules change."""

    def edit(root: Path) -> None:
        for name in names:
            path = root / name
            text = path.read_text()
            path.write_text(text.replace('"""', '"""Edited. ', 1) + "\n\n# a remark\n")

    return code(edit)


def logic(*names: str) -> Edit:
    """Some modules get a function more."""

    def edit(root: Path) -> None:
        for name in names:
            with (root / name).open("a") as file:
                file.write("\n\ndef edited() -> int:\n    return 1\n")

    return code(edit)


def modules_of(folder: str) -> list[str]:
    """All modules of a folder of the code."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob("*.py"))


def replaced(name: str, old: str, new: str) -> Edit:
    """A piece of a file of the code is another one."""

    def edit(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new))

    return code(edit)


def new_keys(root: Path) -> None:
    """Every block of the config's schema, and its top, gains an optional key with a default."""
    path = root / "workflow" / "schemas" / "config.schema.yaml"
    schema = yaml.safe_load(path.read_text())
    key = {"type": "integer", "default": 7, "description": "A new one."}

    def extend(node: dict[str, Any]) -> None:
        for inner in list(node.get("properties", {}).values()):
            extend(inner)
        if "properties" in node:
            node["properties"]["new_key"] = key

    extend(schema)
    extend(schema["$defs"]["training"])
    path.write_text(yaml.safe_dump(schema, sort_keys=False))


def deleted(name: str) -> Edit:
    """One file of the results is gone."""
    return files(lambda folder: (folder / "results" / RUN / name).unlink())


def more_text(name: str, text: str) -> Edit:
    """A data file has more in it."""

    def edit(folder: Path) -> None:
        with (folder / name).open("a") as file:
            file.write(text)

    return files(edit)


def touched(folder: Path) -> None:
    """Data files are newer than all results, and the same."""
    for path in (folder / "data").iterdir():
        os.utime(path)


def audited(*keys: tuple[int, str]) -> Edit:
    """A person has looked at the first pair of some iterations, 0 for human ones, and pressed a key."""

    def edit(folder: Path) -> None:
        run = folder / "results" / RUN
        with Journal(journal_of(run)) as journal:
            desk = Desk(run, journal)
            for iteration, kind in keys:
                table = f"iter{iteration:02d}/pairs" if iteration else "seed/preferences"
                pair = read_table(run / f"{table}.parquet", PREFERENCES).slice(0, 1).to_pylist()[0]
                winner, loser = (image_digest(pair[side]["bytes"]) for side in ("winner", "loser"))
                desk.decide(pair, winner, loser, kind, "a note")
            desk.compact()

    return files(edit)


def without_times(folder: Path) -> None:
    """All files have been written lately, in any order, as `cp -r` or an upload leaves them."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    now = max(path.stat().st_mtime for path in paths) + 100.0
    rng = random.Random(0)
    for path in paths:
        os.utime(path, (now + rng.random(), now + rng.random()))


def without_records(folder: Path) -> None:
    """Snakemake's own records are left behind."""
    shutil.rmtree(folder / ".snakemake")


def renamed(folder: Path) -> None:
    """The run's results have another name."""
    (folder / "results" / RUN).rename(folder / "results" / "renamed")


def another_set(folder: Path) -> None:
    """One more file of evaluation prompts."""
    (folder / "data" / "garden.txt").write_text("a fern in the rain\n")


def of_ones_own(finished: Project, folder: Path) -> tuple[Project, dict[str, Any]]:
    """The finished run as one of files of the user's own, of two prompt sets and a network's metric.

    The files are those that the embedded world has made, so that the results stay as they are, and
    `snakemake --touch` records how they were made; only plans are made of it.
    """
    project = finished.copy(folder / "own")
    world, data = project.results / "world", project.folder / "data"
    shutil.move(world, data)
    evaluation = project.results / "evaluation"
    for path in evaluation.glob("shapes/*/scores/total.parquet"):
        shutil.copy(path, path.with_name("pickscore.parquet"))
    shutil.copytree(evaluation / "shapes", evaluation / "tales")
    shutil.copy(data / "evaluation.txt", data / "evaluation-prompts.txt")
    prompts = (data / "evaluation.txt").read_text()
    assert len(prompts.splitlines()) == 16
    (data / "tales-prompts.txt").write_text(200 * prompts)  # as many as HPSv2's, in its layout too
    config = {
        "shapes": None,
        "preferences": {"files": ["data/preferences.parquet"]},
        "prompts": {"pool": "data/pool.txt"},
        "evaluation": {
            "prompt_sets": {
                "shapes": "data/evaluation-prompts.txt",
                "tales": "data/tales-prompts.txt",
            },
            "metrics": ["total", "caption_match", "pickscore"],
        },
        "metrics": {"pickscore": {"weights": "data/pickscore"}},
    }
    project.make("--quiet", "all", "--touch", config=config)
    return project, config


def recorded(project: Project) -> set[str]:
    """The files that Snakemake has records of."""
    names = (path.name for path in (project.folder / ".snakemake" / "metadata").rglob("*"))
    return {base64.urlsafe_b64decode(name).decode() for name in names}


CODE = "The code"
DATA = "The config: run, model, data"
LOOP = "The config: training and the loop"
EVALUATION = "The config: evaluation, export, execution"
FILES = "Files"
COMMAND = "The command and the place"

ROWS = [
    Row(
        section=CODE,
        change="comments, docstrings, layout of a stage or of a core module",
        edit=remarks(
            "stages/update_policy.py",
            "stages/core/method/objective.py",
            "stages/core/execution/runtime.py",
        ),
    ),
    Row(
        section=CODE,
        change="the logic of a stage, here `stages/select_pairs.py`",
        begins=("select_pairs",),
        edit=logic("stages/select_pairs.py"),
    ),
    Row(
        section=CODE,
        change="the logic of a core module, here `core/method/selection.py`, which one stage imports",
        begins=("select_pairs",),
        edit=logic("stages/core/method/selection.py"),
    ),
    Row(
        section=CODE,
        change="`core/evaluation/statistics.py`, which the stages of the evaluation import",
        begins=("summarise_evaluation", "summarise_guards", "measure_diversity"),
        edit=logic("stages/core/evaluation/statistics.py"),
    ),
    Row(
        section=CODE,
        change="`core/method/rewards.py`, which three stages import",
        begins=("score_candidates", "select_pairs", "score_holdout"),
        edit=logic("stages/core/method/rewards.py"),
    ),
    Row(
        section=CODE,
        change="`core/method/seeding.py` or another module that stages import through others",
        begins=("split_captions",),
        edit=logic("stages/core/method/seeding.py"),
    ),
    Row(
        section=CODE,
        change="any module of `core/execution`, which says how a stage runs",
        edit=logic(*modules_of("stages/core/execution")),
    ),
    Row(
        section=CODE,
        change="`core/training/optimizers.py`, which the trainings import",
        begins=("train_seed", "update_policy"),
        note="the base is not sampled again",
        edit=logic("stages/core/training/optimizers.py"),
    ),
    Row(
        section=CODE,
        change="one scorer, for example `stages/metrics/hpsv2.py`",
        begins=("score_metric", "score_candidates_by_metric", "measure_diversity"),
        note="the scores of all metrics, because one stage computes them",
        edit=logic("stages/metrics/hpsv2.py"),
    ),
    Row(
        section=CODE,
        change="the report's template, a file that lies beside its module",
        begins=("write_report",),
        edit=replaced(
            "stages/core/report/report.html.jinja", "<h3>Reproduce</h3>", "<h3>Again</h3>"
        ),
    ),
    Row(
        section=CODE,
        change="`stages/launch.py`, `doctor.py`, `preflight.py`, `inspect.py`, `compare.py`, `status.py`, "
        "`core/plan`, which no rule's result comes from",
        edit=logic(
            *("stages/launch.py", "stages/doctor.py", "stages/preflight.py"),
            *("stages/inspect.py", "stages/compare.py", "stages/status.py"),
            *modules_of("stages/core/plan"),
            *modules_of("stages/core/preflight"),
            *modules_of("stages/core/inspection"),
            *modules_of("stages/core/progress"),
        ),
    ),
    Row(
        section=CODE,
        change="the text of a rule's `shell:`",
        note="values and code versions are in `params`; `-R FILE` reruns by hand",
        edit=replaced("workflow/rules/iterate.smk", "--pairs {input", "  --pairs {input"),
    ),
    Row(
        section=CODE,
        change="`envs/*.yaml`, a package's version",
        note="`make doctor` names mixed versions; `-R FILE` reruns by hand",
        edit=replaced("envs/sail.yaml", "dependencies:", "dependencies:\n  - cowsay"),
    ),
    Row(
        section=CODE,
        change="the schema: a new optional key with a default, in any block",
        edit=code(new_keys),
    ),
    Row(
        section=DATA,
        change="a key that is set to its default",
        config={
            "lora": {"rank": 0, "alpha": 16},
            "train_seed": {"loss": "sigmoid", "label_smoothing": 0, "policy": None},
            "held_out_curve": {"num_pairs": 64, "every_steps": 20},
            "preferences": {"layout": "auto", "skip_bad": 0},
            "evaluation": {"compare_with": [], "allow_leakage": False, "paper_model": None},
            "guards": {"max_drift": None},
            "model": {"vae": None},
            "online": {"method": "none", "rounds": 1000},
            "step_judge": {"clip": None, "num_steps": 8000},
            "export": {"dtype": "float16"},
        },
    ),
    Row(
        section=DATA,
        change="`run`",
        begins=EVERYTHING,
        note="in a folder of its own; the other run stays as it is",
        config={"run": "another"},
        reshapes=True,
    ),
    Row(
        section=DATA,
        change="`seed`",
        begins=("import_preferences", "select_prompts"),
        note="that is all but the base's evaluation images and scores; in the embedded world everything",
        config={"seed": 1},
        is_own=True,
    ),
    Row(
        section=DATA,
        change="`model.base`",
        begins=("import_preferences", "encode_preferences", "generate_evaluation"),
        note="that is all but the prompts; the import counts long captions by the model's tokenizer",
        config={"model": {"base": "elsewhere"}},
        is_own=True,
    ),
    Row(
        section=DATA,
        change="`model.dtype`, `vae`, `config`, `compile`, `max_sequence_length`",
        begins=("encode_preferences", "generate_evaluation"),
        config={"model": {"dtype": "bfloat16"}},
        is_own=True,
    ),
    Row(
        section=DATA,
        change="`preferences.*`",
        begins=("import_preferences",),
        config={"preferences": {"num_holdout": 3, "skip_bad": 2}},
    ),
    Row(
        section=DATA,
        change="`preferences.shards`",
        begins=("encode_shard",),
        note="with the same latents, bit by bit",
        config={"preferences": {"shards": 2}},
        reshapes=True,
    ),
    Row(
        section=DATA,
        change="`prompts.per_iteration` of iteration 2",
        begins=("select_prompts (iter02)",),
        config={"prompts": {"per_iteration": [4, 5]}},
    ),
    Row(
        section=DATA,
        change="`prompts.per_iteration` of an iteration that is not run",
        begins=("write_report",),
        note="it shows the config",
        config={"prompts": {"per_iteration": [4, 4, 9]}},
    ),
    Row(
        section=DATA,
        change="`shapes.pairs_per_caption`, `label_temperature`, `tie_below`",
        begins=("make_preferences",),
        config={"shapes": {"tie_below": 0.06}},
    ),
    Row(
        section=DATA,
        change="`shapes.evaluation_fold`, `num_evaluation_captions`, `num_seed_captions`",
        begins=("split_captions",),
        config={"shapes": {"evaluation_fold": "tuning"}},
    ),
    Row(
        section=LOOP,
        change="`iterations`: more",
        begins=(
            "select_prompts (iter03)",
            "sample_candidates (iter03)",
            "check_leakage",
        ),
        note="only the new iteration, its evaluation and export, and the summaries",
        config={"iterations": 3, "prompts": {"per_iteration": [4, 4, 4]}},
        reshapes=True,
    ),
    Row(
        section=LOOP,
        change="`iterations`: fewer",
        begins=("check_leakage", "summarise_evaluation", "summarise_guards"),
        note="the summaries; what later iterations made is left where it is",
        config={"iterations": 1},
        reshapes=True,
    ),
    Row(
        section=LOOP,
        change="`lora.rank`, and with a rank `alpha`, `target_modules`",
        begins=("train_seed", "update_policy", "export_policy"),
        config={"lora": {"rank": 4}},
        reshapes=True,
    ),
    Row(
        section=LOOP,
        change="`lora.alpha`, `target_modules` without a rank",
        begins=("write_report",),
        note="it shows the config",
        config={"lora": {"alpha": 8}},
    ),
    Row(
        section=LOOP,
        change="`train_seed.learning_rate` or another number of it",
        begins=("train_seed",),
        config={"train_seed": {"learning_rate": 6.0e-6}},
    ),
    Row(
        section=LOOP,
        change="`train_seed.policy`",
        begins=("adopt_policy",),
        config={"train_seed": {"policy": "elsewhere"}},
        reshapes=True,
    ),
    Row(
        section=LOOP,
        change="`held_out_curve.*`",
        begins=("train_seed",),
        note="the curve is drawn during a training",
        config={"held_out_curve": {"every_steps": 7}},
    ),
    Row(
        section=LOOP,
        change="`sampling.*`",
        begins=("sample_candidates", "generate_evaluation"),
        note="in the embedded world `make_preferences` too",
        config={"sampling": {"guidance_scale": 3.0}},
        is_own=True,
    ),
    Row(
        section=LOOP,
        change="`sample_candidates.candidates_per_prompt`",
        begins=("sample_candidates",),
        config={"sample_candidates": {"candidates_per_prompt": 4}},
    ),
    Row(
        section=LOOP,
        change="`sample_candidates.sampling.*`",
        begins=("sample_candidates",),
        note="evaluation images stay",
        config={"sample_candidates": {"sampling": {"num_inference_steps": 3}}},
    ),
    Row(
        section=LOOP,
        change="`sample_candidates.files.*`",
        begins=("sample_candidates",),
        config={"sample_candidates": {"files": {"kind": "jpeg"}}},
    ),
    Row(
        section=LOOP,
        change="`sample_candidates.shards`",
        begins=("sample_candidates",),
        note="with the same results, bit by bit",
        config={"sample_candidates": {"shards": 3}},
        reshapes=True,
    ),
    Row(
        section=LOOP,
        change="`score_candidates.num_draws`, `reference`, `reencode`",
        begins=("score_candidates",),
        note="iteration 1 is not sampled again",
        config={"score_candidates": {"num_draws": 3}},
    ),
    Row(
        section=LOOP,
        change="`score_candidates.rewards_by`, `dtype`, `draw_law`, `embedded_guidance`",
        begins=("score_candidates", "score_holdout"),
        note="iteration 1 is not sampled again",
        config={"score_candidates": {"rewards_by": "derivative"}},
    ),
    Row(
        section=LOOP,
        change="`score_candidates.weights`, `snr_power`",
        begins=("calibrate_judge", "select_pairs"),
        note="no candidate is sampled or scored again in iteration 1",
        config={"score_candidates": {"weights": "inverse_snr"}},
        reshapes=True,
    ),
    Row(
        section=LOOP,
        change="`score_candidates.adaptive_confidence`, `first_draws`",
        begins=("score_candidates",),
        note="iteration 1 is not sampled again",
        config={"score_candidates": {"adaptive_confidence": 0.9, "num_draws": 3, "first_draws": 2}},
    ),
    Row(
        section=LOOP,
        change="`select_pairs.strategy`, `min_margin_in_standard_errors`, `min_probability`",
        begins=("select_pairs",),
        config={"select_pairs": {"strategy": "random"}},
    ),
    Row(
        section=LOOP,
        change="`select_pairs.ranker`",
        begins=("score_candidates_by_metric (caption_match)", "select_pairs"),
        config={"select_pairs": {"ranker": "caption_match"}},
        reshapes=True,
    ),
    Row(
        section=LOOP,
        change="`mix_preferences.seed_fraction`",
        begins=("mix_preferences",),
        config={"mix_preferences": {"seed_fraction": 0.5}},
    ),
    Row(
        section=LOOP,
        change="`update_policy.learning_rate` or another number of it",
        begins=("update_policy",),
        note="iteration 1's candidates, rewards and pairs stay",
        config={"update_policy": {"learning_rate": 5.0e-6}},
    ),
    Row(
        section=LOOP,
        change="`update_policy.dpo_beta`",
        begins=("select_pairs", "score_holdout"),
        note="it is part of p(winner > loser) too",
        config={"update_policy": {"dpo_beta": 4000.0}},
    ),
    Row(
        section=LOOP,
        change="`update_policy.soft_labels`",
        begins=("update_policy",),
        config={"update_policy": {"soft_labels": True}},
    ),
    Row(
        section=LOOP,
        change="`update_policy.reference`",
        begins=("update_policy",),
        config={"update_policy": {"reference": "base"}},
        reshapes=True,
    ),
    Row(
        section=EVALUATION,
        change="`evaluation.metrics`: one more",
        begins=("score_metric (sharpness)",),
        config={"evaluation": {"metrics": ["total", "caption_match", "sharpness"]}},
        reshapes=True,
    ),
    Row(
        section=EVALUATION,
        change="`evaluation.metrics`: one less",
        begins=("summarise_evaluation",),
        config={"evaluation": {"metrics": ["total"]}},
    ),
    Row(
        section=EVALUATION,
        change="`evaluation.primary_metric`, `paper_model`",
        begins=("write_report",),
        config={"evaluation": {"primary_metric": "caption_match", "paper_model": "sd15"}},
    ),
    Row(
        section=EVALUATION,
        change="`evaluation.candidate_metric`",
        begins=("score_candidates_by_metric (caption_match)",),
        config={"evaluation": {"candidate_metric": "caption_match"}},
        reshapes=True,
    ),
    Row(
        section=EVALUATION,
        change="`evaluation.seed`",
        begins=("generate_evaluation", "score_holdout"),
        config={"evaluation": {"seed": 5}},
    ),
    Row(
        section=EVALUATION,
        change="`evaluation.images_per_prompt`",
        begins=("generate_evaluation",),
        config={"evaluation": {"images_per_prompt": 3}},
    ),
    Row(
        section=EVALUATION,
        change="`evaluation.shards`",
        begins=("generate_evaluation",),
        note="with the same images, bit by bit; no training",
        config={"evaluation": {"shards": 2}},
        reshapes=True,
    ),
    Row(
        section=EVALUATION,
        change="`evaluation.holdout_draws`",
        begins=("score_holdout",),
        config={"evaluation": {"holdout_draws": 3}},
    ),
    Row(
        section=EVALUATION,
        change="`evaluation.compare_with`",
        begins=("summarise_evaluation",),
        config={"evaluation": {"compare_with": [f"results/{RUN}/iter00"]}},
    ),
    Row(
        section=EVALUATION,
        change="`online.method`: a policy trained online beside the run's",
        begins=("select_online_prompts",),
        note="no training of the run",
        config={
            "online": {
                "method": "ddpo",
                "judge": "total",
                "num_prompts": 2,
                "prompts_per_update": 2,
                "batch_transitions": 40,
            }
        },
        reshapes=True,
    ),
    Row(
        section=EVALUATION,
        change="`step_judge.clip`: a judge of unfinished images",
        begins=("train_step_judge", "write_report"),
        note="online training where it judges",
        config={"step_judge": {"clip": "some/clip"}},
        reshapes=True,
    ),
    Row(
        section=EVALUATION,
        change="`evaluation.allow_leakage`",
        begins=("check_leakage",),
        config={"evaluation": {"allow_leakage": True}},
    ),
    Row(
        section=EVALUATION,
        change="`evaluation.prompt_sets`: one more",
        begins=("import_preferences", "select_evaluation_prompts (garden)", "select_prompts"),
        note="because no training may see its prompts",
        config={"evaluation": {"prompt_sets": {"garden": "data/garden.txt"}}},
        edit=files(another_set),
        is_own=True,
        reshapes=True,
    ),
    Row(
        section=EVALUATION,
        change="the same, with the earlier sets in `evaluation.exclude_from_training`",
        begins=("select_evaluation_prompts (garden)",),
        note="nothing is trained; prompts that a training has seen are refused",
        config={
            "evaluation": {
                "prompt_sets": {"garden": "data/garden.txt"},
                "exclude_from_training": ["shapes", "tales"],
            }
        },
        edit=files(another_set),
        is_own=True,
        reshapes=True,
    ),
    Row(
        section=EVALUATION,
        change="`evaluation.exclude_from_training`: one set less",
        begins=("import_preferences", "select_prompts"),
        note="one set less in `prompt_sets` does the same: more may be trained on",
        config={"evaluation": {"exclude_from_training": ["shapes"]}},
        is_own=True,
    ),
    Row(
        section=EVALUATION,
        change="`evaluation.prompt_layouts`",
        begins=("select_evaluation_prompts (tales)",),
        config={"evaluation": {"prompt_layouts": {"tales": "hpsv2"}}},
        is_own=True,
    ),
    Row(
        section=EVALUATION,
        change="`metrics.pickscore.weights` or another option of one metric",
        begins=("score_metric (pickscore)", "measure_diversity"),
        note="diversity where that metric's features measure it",
        config={"metrics": {"pickscore": {"weights": "elsewhere"}}},
        is_own=True,
    ),
    Row(
        section=EVALUATION,
        change="`evaluation.diversity_features`",
        begins=("measure_diversity",),
        config={"evaluation": {"diversity_features": "perceptual"}},
        is_own=True,
    ),
    Row(
        section=EVALUATION,
        change="`guards.*`, except `on_collapse`",
        begins=("summarise_guards",),
        note="seconds; nothing is trained or sampled",
        config={"guards": {"max_confident_share": 0.8, "max_drift": 0.1}},
    ),
    Row(
        section=EVALUATION,
        change="`guards.on_collapse`",
        begins=("check_collapse", "start_iteration"),
        note="all iterations from 1 on: set it before the run",
        config={"guards": {"on_collapse": "stop"}},
        reshapes=True,
    ),
    Row(
        section=EVALUATION,
        change="`export.policies`: one more",
        begins=("export_policy (single-file)", "write_model_cards"),
        config={"export": {"policies": ["diffusers", "single-file"]}},
        reshapes=True,
    ),
    Row(
        section=EVALUATION,
        change="`export.preferences`: one more",
        begins=("export_preferences (imagefolder)",),
        config={"export": {"preferences": ["imagefolder"]}},
        reshapes=True,
    ),
    Row(
        section=EVALUATION,
        change="`export.dtype`",
        begins=("export_policy",),
        config={"export": {"dtype": "bfloat16"}},
    ),
    Row(
        section=EVALUATION,
        change="`execution.*`: micro-batches, checkpointing, processes, jobs per GPU, batches, trackers, warm starts",
        config={
            "execution": {
                "warm_start": True,
                "training_gpus": 2,
                "jobs_per_gpu": 3,
                "micro_batch_pairs": 2,
                "gradient_checkpointing": True,
                "save_every": 9,
                "save_minutes": 3,
                "trackers": ["tensorboard"],
                "candidate_prompts_per_batch": 1,
                "online_prompts_per_batch": 2,
                "score_rows_per_batch": 2,
                "evaluation_prompts_per_batch": 3,
                "metric_images_per_batch": 5,
            }
        },
    ),
    Row(
        section=EVALUATION,
        change="`notify`",
        config={"notify": "cat"},
    ),
    Row(
        section=FILES,
        change="a label or prompt file is touched, its content stays",
        note="of files up to 100 MB; larger ones count as changed",
        edit=files(touched),
        is_own=True,
    ),
    Row(
        section=FILES,
        change="the content of a label file",
        begins=("import_preferences",),
        edit=more_text("data/preferences.parquet", "more"),
        is_own=True,
    ),
    Row(
        section=FILES,
        change="the content of a prompt pool",
        begins=("select_prompts",),
        edit=more_text("data/pool.txt", "a fern in the rain\n"),
        is_own=True,
    ),
    Row(
        section=FILES,
        change="a deleted shard, here of iteration 2's candidates",
        begins=("sample_candidates (iter02/candidates/shard-1)",),
        edit=deleted("iter02/candidates/shard-1.parquet"),
    ),
    Row(
        section=FILES,
        change="a deleted policy (its `manifest.json`)",
        begins=("update_policy (iter02)",),
        edit=deleted("iter02/policy/manifest.json"),
    ),
    Row(
        section=FILES,
        change="a deleted table, here `iter01/pairs.parquet`",
        begins=("select_pairs (iter01)",),
        edit=deleted("iter01/pairs.parquet"),
    ),
    Row(
        section=FILES,
        change="a deleted `evaluation/SET/POLICY/scores/METRIC.parquet`",
        begins=("score_metric (iter01/scores/total)",),
        edit=deleted("evaluation/shapes/iter01/scores/total.parquet"),
    ),
    Row(
        section=FILES,
        change="a deleted `report.html` or `config.json`",
        begins=("write_report",),
        edit=deleted("config.json"),
    ),
    Row(
        section=FILES,
        change="a veto or a flip in the audit, of a pair of iteration 2",
        begins=("mix_preferences (iter02)",),
        note="its pairs stay what the judge chose",
        edit=audited((2, "veto")),
    ),
    Row(
        section=FILES,
        change="a veto or a flip in the audit, of a human pair",
        begins=("mix_preferences",),
        note="the seed training keeps its pairs",
        edit=audited((0, "flip")),
    ),
    Row(
        section=FILES,
        change="the same, with `train_seed.use_decisions`",
        begins=("train_seed",),
        note="and so all that comes after it",
        edit=audited((0, "flip")),
        config={"train_seed": {"use_decisions": True}},
    ),
    Row(
        section=FILES,
        change="a look at the run in the audit, pairs accepted, notes",
        edit=audited((1, "accept"), (2, "note"), (0, "note")),
    ),
    Row(
        section=COMMAND,
        change="the same command again; other `--cores`, `--resources gpu=8`",
        flags=("--cores", "7", "--resources", "gpu=8"),
    ),
    Row(
        section=COMMAND,
        change="the project's folder, moved or copied with its times (`mv`, `cp -a`, `rsync -a`)",
        edit=files(lambda folder: None),
    ),
    Row(
        section=COMMAND,
        change="the same, its times lost (`cp -r`, an upload)",
        note="files above 100 MB count as changed",
        edit=files(without_times),
    ),
    Row(
        section=COMMAND,
        change="`results/RUN` renamed, and `run` with it",
        note="but later changes of code or config are not noticed in what has no record",
        config={"run": "renamed"},
        edit=files(renamed),
    ),
    Row(
        section=COMMAND,
        change="`results/` alone, without `.snakemake/`",
        note="with the same consequence",
        edit=files(without_records),
    ),
]


def table() -> str:
    """The rows in Markdown, a table for each section."""
    lines: list[str] = []
    for section in dict.fromkeys(row.section for row in ROWS):
        lines += ["", f"### {section}", "", "| you change | reruns |", "|---|---|"]
        lines += [row.line() for row in ROWS if row.section == section]
    return "\n".join([*lines, ""])


def in_step(page: str) -> str:
    """The page with the table of now between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main(flags: Sequence[str]) -> None:
    """Write the page, or fail if it is not in step."""
    page = PAGE.read_text(encoding="utf-8")
    if "--check" in flags:
        raise SystemExit(page != in_step(page))
    PAGE.write_text(in_step(page), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
