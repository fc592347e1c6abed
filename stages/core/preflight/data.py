"""Whether the data of a config is there and enough, all of it read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from stages.core.artifacts.images import ImageError
from stages.core.data.evaluation_prompts import EvaluationPrompt
from stages.core.data.image_spool import ImageSpool
from stages.core.data.layouts.columns import Columns
from stages.core.data.layouts.labels import Cell, Label, Layout, Ledger, Like
from stages.core.data.layouts.recognition import find_layout
from stages.core.data.likes import layout_of_likes
from stages.core.data.prompts import read_pool
from stages.core.errors import UserError
from stages.core.evaluation.paper import read_paper_tables
from stages.core.plan.pool import count_free, read_set
from stages.core.plan.run import RunPlan, files_of, matches_of
from stages.core.preflight.findings import Findings

LABELS_LOOKED_AT = 200
"""Labels whose images preflight reads."""


def check_prompts(plan: RunPlan, findings: Findings) -> int:
    """Prompts of all evaluation sets; notes unreadable files, and a pool that is too small."""
    pool = [text for name in plan.pool for text in read_named_pool(name, findings)]
    sets = {name: read_named_set(plan, name, findings) for name in plan.prompt_sets}
    if pool:
        excluded = [row.prompt for name in plan.excluded_sets for row in sets[name]]
        findings.add_all(plan.pool_problems(count_free(pool, excluded)))
    return sum(map(len, sets.values()))


def read_named_pool(name: str, findings: Findings) -> list[str]:
    """The prompts that a name of the config stands for; none where there is no such file."""
    what, files = f"prompts.pool {name}", files_of([name])
    if not files:
        return []
    try:
        pool = read_pool(*map(Path, files))
    except UserError as error:
        findings.add(what, str(error), holds=False)
        return []
    rest = f", {pool.num_left_out:,} empty or too long are left out" if pool.num_left_out else ""
    findings.add(what, f"{len(pool.prompts):,} prompts{rest}", holds=True)
    return pool.prompts


def read_named_set(plan: RunPlan, name: str, findings: Findings) -> list[EvaluationPrompt]:
    """The prompts of an evaluation set; none where there is no such file."""
    path = plan.config["evaluation"]["prompt_sets"][name]
    what = f"evaluation.prompt_sets.{name} {path}"
    if not files_of([path]):
        return []
    try:
        rows = read_set(plan, name)
    except UserError as error:
        findings.add(what, str(error), holds=False)
        return []
    findings.add(what, f"{len(rows):,} prompts", holds=True)
    return rows


def labelled_pairs(config: Mapping[str, Any], findings: Findings) -> int:
    """Usable labels of all files of human ones (pairs, or with unpaired single likes); notes what cannot be recognised, what is too few or bad,
    and images that are not there, of which some are looked at.
    """
    block = config["preferences"]
    columns: dict[str, Any] = dict(block.get("columns", {}))
    names = block.get("files", [])
    if not all(map(matches_of, names)) or not names:
        return 0
    shown = f"preferences.files {', '.join(names)}"
    try:
        layout = find_layout(
            [Path(name) for name in names],
            block["layout"],
            Columns(**columns | {"group": tuple(columns.get("group", ()))}),
            Path(block["root"]) if "root" in block else None,
        )
        ledger = Ledger(allowed_bad=block.get("skip_bad", 0))
        labels: list[Label] | list[Like] = (
            list(layout_of_likes(layout).likes(ledger))
            if block.get("unpaired")
            else list(layout.labels(ledger))
        )
    except UserError as error:
        findings.add(shown, str(error), holds=False)
        return 0
    found = f"{len(layout.files)} files, layout {layout.name}, {len(labels):,} usable rows"
    bad = f", {len(ledger.bad):,} that cannot be used" if ledger.bad else ""
    findings.add(shown, found + bad, holds=True)
    wanted = max(2, block.get("num_pairs") or 2)
    wanted += block.get("num_holdout", 0) * (2 if block.get("unpaired") else 1)
    if len(labels) < wanted:
        found = (
            f"{wanted:,} are wanted with preferences.num_holdout, at most {len(labels):,} are there"
        )
        findings.add("preferences.num_pairs", found, holds=False)
    look_at_images(layout, labels, findings)
    return len(labels)


def look_at_images(layout: Layout, labels: Sequence[Label | Like], findings: Findings) -> None:
    """Read the images of some labels, evenly spread, as the import reads them."""
    some = labels[:: max(1, len(labels) // LABELS_LOOKED_AT)][:LABELS_LOOKED_AT]
    wanted: dict[Path, set[Cell]] = defaultdict(set)
    for label in some:
        for file, cell in label.places:
            wanted[file].add(cell)
    problems = []
    with TemporaryDirectory() as folder, ImageSpool(Path(folder)) as spool:
        for file, cells in wanted.items():
            for image in layout.images(file, cells):
                try:
                    spool.store(image)
                except ImageError as error:
                    problems.append(f"{file}, row {image.cell.row}: {error}")
    found = f"those of {len(some):,} labels can be read"
    if problems:
        found = f"{len(problems)} of {sum(len(label.places) for label in some):,} cannot be read: {'; '.join(problems[:3])}"
    findings.add("images of preferences.files", found, holds=not problems)


def check_evaluation(plan: RunPlan, findings: Findings) -> None:
    """Settings of the evaluation that would be found wrong, or missed, only at its end."""
    evaluation = plan.config["evaluation"]
    if evaluation["images_per_prompt"] < 2:
        found = "is not measured with evaluation.images_per_prompt: 1; set it to 2 or more"
        findings.add("diversity of images", found, holds=not plan.is_blind)
    if evaluation["allow_leakage"]:
        what = "evaluation.allow_leakage"
        findings.add(what, "is on: shared prompts are reported, not refused", holds=True)
    for _, other, scores in plan.scores_of_others:
        if not Path(scores).is_file():
            found = (
                f"has no {scores}: that run must have scored the same prompts by the same metric"
            )
            findings.add(f"evaluation.compare_with {other}", found, holds=False)
    if evaluation["paper_model"]:
        check_paper(plan, findings)


def check_paper(plan: RunPlan, findings: Findings) -> None:
    """Whether the paper has numbers of this run's prompt sets and metrics."""
    model, metrics = (plan.config["evaluation"][key] for key in ("paper_model", "metrics"))
    rows = [row for row in read_paper_tables() if row.model == model]
    known = {(column.prompt_set, column.metric) for row in rows for column in row.values}
    shown = [pair for pair in known if pair[0] in plan.prompt_sets and pair[1] in metrics]
    found = f"has {len(shown)} columns of this run's prompt sets and metrics"
    findings.add(f"evaluation.paper_model {model}", found, holds=bool(shown))
