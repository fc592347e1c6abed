"""Whether the data of a config is there and enough, all of it read."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stages.core.data.evaluation_prompts import EvaluationPrompt
from stages.core.data.layouts.columns import Columns
from stages.core.data.layouts.labels import Layout, Ledger
from stages.core.data.layouts.recognition import find_layout
from stages.core.data.prompts import read_pool
from stages.core.errors import UserError
from stages.core.evaluation.paper import read_paper_tables
from stages.core.plan.pool import count_free, read_set
from stages.core.plan.run import RunPlan, files_of, matches_of
from stages.core.preflight.findings import Findings


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
    """Rows of all files of human labels; notes what cannot be recognised."""
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
        rows = num_labels(layout)
    except UserError as error:
        findings.add(shown, str(error), holds=False)
        return 0
    found = f"{len(layout.files)} files, layout {layout.name}, {rows:,} rows"
    findings.add(shown, found, holds=True)
    return rows


def num_labels(layout: Layout) -> int:
    """Rows of Parquet files by their metadata; of other files by reading them."""
    if all(file.suffix == ".parquet" for file in layout.files):
        return sum(pq.read_metadata(file).num_rows for file in layout.files)
    return sum(1 for _label in layout.labels(Ledger(allowed_bad=sys.maxsize)))


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
