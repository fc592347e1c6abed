"""A run on files of one's own: any layout, prompts from the label files, sets that never overlap."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.builders import CAPTIONS, read_rows
from tests.label_files import WRITERS, some_pairs
from tests.workflow.projects import Project


def test_seed_pairs_iteration_prompts_and_evaluation_sets_never_overlap(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    WRITERS["pairs-csv"][1](data / "labels", some_pairs(20))
    WRITERS["folders"][1](data / "studio", some_pairs(20))
    (data / "evaluation.tsv").write_text("Prompt\tCategory\n" + "\n".join(
        f"{caption.upper()}\tany" for caption in CAPTIONS[18:24]))  # fmt: skip
    (data / "pool.json").write_text(json.dumps(CAPTIONS[:30]))
    project = Project(tmp_path)
    config = {
        "shapes": None,
        "preferences": {"files": ["data/studio"], "num_pairs": 6, "num_holdout": 2},
        "prompts": {"pool": ["data/pool.json", "data/labels/*.csv"], "per_iteration": [8, 8]},
        "evaluation": {"prompt_sets": {"parti": "data/evaluation.t*"}, "metrics": ["sharpness"],
                       "primary_metric": "sharpness", "candidate_metric": None},
    }  # fmt: skip
    targets = ("seed/import.json", "prompts/iter01.parquet", "prompts/iter02.parquet")
    paths = [f"results/test/{target}" for target in targets]
    project.make("--quiet", "all", "--", *paths, config=config)
    report = json.loads((project.results / "seed/import.json").read_text())
    assert report["layout"] == "folders"
    assert report["pairs_in_other_sets_dropped"] == 2
    assert report["long_captions"]["captions_cut"] == 0
    sets = [
        {row["prompt_id"] for row in read_rows(project.results / f"{name}.parquet")}
        for name in ("seed/preferences", "seed/holdout", "evaluation/parti/prompts",
                     "prompts/iter01", "prompts/iter02")
    ]  # fmt: skip
    assert [len(some) for some in sets] == [6, 2, 6, 8, 8]
    assert len(set.union(*sets)) == 30
    planned = project.planned("--", *paths, config=config)
    assert not planned
    (data / "studio" / "3.txt").write_text("another caption")
    assert project.planned("--", *paths, config=config)["import_preferences"] == 1


@pytest.mark.parametrize("name", ["data/none-*.parquet", "data/none"])
def test_labels_that_are_not_there_are_named(tmp_path: Path, name: str) -> None:
    project = Project(tmp_path)
    config = {
        "shapes": None,
        "preferences": {"files": [name], "num_pairs": 6, "num_holdout": 2},
        "prompts": {"pool": name, "per_iteration": [8, 8]},
        "evaluation": {"prompt_sets": {"parti": name}, "metrics": ["sharpness"],
                       "primary_metric": "sharpness", "candidate_metric": None},
    }  # fmt: skip
    done = project.call("--quiet", "all", "--dry-run", config=config)
    assert done.returncode != 0
    assert f"preferences.files: {name}" in done.stdout
    assert f"prompts.pool: {name}" in done.stdout
