"""A whole run whose human labels are single likes: from the file to the report, and not a job again."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from stages.core.artifacts.schemas import LIKED_PAIRS, LIKES
from stages.core.artifacts.tables import holds
from stages.core.audit.index import RunIndex
from stages.core.plan.configuration import merged
from tests.builders import CAPTIONS, encoded, picture, read_rows
from tests.workflow.projects import Project

CONFIG: dict[str, Any] = {
    "shapes": None,
    "iterations": 1,
    "preferences": {
        "files": ["data/likes.csv"], "unpaired": True, "num_pairs": 8, "num_holdout": 4,
    },
    "prompts": {"pool": "data/pool.txt", "per_iteration": [4]},
    "train_seed": {"loss": "kto", "passes": 4.0},
    "mix_preferences": {"seed_fraction": 0.0},
    "evaluation": {
        "prompt_sets": {"ours": "data/evaluation.txt"}, "metrics": ["total", "sharpness"],
        "primary_metric": "total",
    },
}  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Twenty-four captions with one image each, every second of which was liked."""
    data = tmp_path / "data"
    data.mkdir()
    rows = []
    for number, caption in enumerate(CAPTIONS[:24]):
        (data / f"{number}.jpg").write_bytes(encoded(picture(caption)))
        rows.append((caption, f"{number}.jpg", number % 2))
    with (data / "likes.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "image", "liked"), *rows])
    (data / "pool.txt").write_text("\n".join(CAPTIONS))
    (data / "evaluation.txt").write_text("\n".join(CAPTIONS[24:34]))
    return Project(tmp_path)


def refused(project: Project, **changes: Any) -> str:
    done = project.call("--quiet", "all", "--dry-run", config=merged(CONFIG, changes))
    assert done.returncode != 0
    return done.stdout


@pytest.mark.slow
def test_a_run_on_single_likes_goes_to_its_end(project: Project) -> None:
    project.make("--quiet", "all", config=CONFIG)
    seed = project.results / "seed"
    assert holds(seed / "preferences.parquet", LIKES)
    assert holds(seed / "holdout.parquet", LIKED_PAIRS)
    assert len(read_rows(project.results / "iter00/training.parquet")) == 8
    mix = read_rows(project.results / "iter01/preferences.parquet")
    assert {row["source"] for row in mix} == {"generated"}
    held_out = read_rows(seed / "holdout.parquet")
    kept = {row[key] for row in held_out for key in ("prompt", "loser_prompt")}
    kept |= {row["prompt"] for row in read_rows(seed / "preferences.parquet")}
    drawn = {row["prompt"] for row in read_rows(project.results / "prompts/iter01.parquet")}
    assert len(kept) == 16
    assert not drawn & kept
    guards = read_rows(project.results / "evaluation/guards.parquet")
    assert [row["num_holdout_pairs"] for row in guards] == [4, 4]
    page = (project.results / "report.html").read_text(encoding="utf-8")
    assert "6 liked and 2 disliked images trained on, 4 of each held out" in page
    index = RunIndex(project.results)
    assert not index.has_human
    [item] = index.listing("holdout", 1).items[:1]
    assert item.prompt == f"{held_out[0]['prompt']} (disliked: {held_out[0]['loser_prompt']})"
    assert not project.planned(config=CONFIG)
    config = json.loads((project.results / "config.json").read_text())
    assert config["preferences"]["unpaired"] is True


def test_what_likes_do_not_go_with_is_refused_before_the_first_job(project: Project) -> None:
    text = refused(project, train_seed={"loss": "sigmoid"}, mix_preferences={"seed_fraction": 0.25})
    assert "'train_seed.loss' is 'sigmoid', which compares two images; use the loss 'kto'" in text
    assert "'mix_preferences.seed_fraction' is 0.25" in text
    planned = project.planned(config=CONFIG)
    assert planned["train_seed"] == planned["import_preferences"] == 1
    assert planned["update_policy"] == 1
