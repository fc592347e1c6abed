"""A run trains its own judge of unfinished images, and its online method is judged by it: the real commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.builders import read_rows
from tests.metrics import official
from tests.tiny_models import tokenizer
from tests.workflow.projects import RUN, Project


@pytest.mark.slow
def test_the_judge_of_a_run_is_trained_and_judges(tmp_path: Path) -> None:
    tokenizer(tmp_path / "words")
    official.clip_folder(tmp_path / "clip", activation="gelu", seed=1)
    config = {
        "step_judge": {
            "clip": "clip", "tokenizer": "words", "num_steps": 3, "batch_pairs": 4,
            "warmup_steps": 1, "every_steps": 2,
        },
        "online": {
            "method": "spo", "judge": "spm", "num_prompts": 4, "rounds": 2, "prompts_per_update": 2,
            "candidates_per_prompt": 2, "num_inference_steps": 3, "divert_step": 1,
            "min_preference_gap": 0, "batch_transitions": 4,
        },
    }  # fmt: skip
    project = Project(tmp_path)
    project.make("--until", "train_online", config=config)
    judge = project.results / "step_judge" / "judge"
    curve = read_rows(project.results / "step_judge" / "curve.parquet")
    assert sorted({point["step"] for point in curve}) == [0, 2, 3]
    assert len(read_rows(project.results / "step_judge" / "training.parquet")) == 3
    assert (judge / "config.json").is_file()
    manifest = json.loads((project.results / "online/policy/manifest.json").read_text())
    assert manifest["sail_arguments"]["judge"]["name"] == "spm"
    assert f"results/{RUN}/step_judge/judge/manifest.json" in manifest["sail_inputs"]
    assert read_rows(project.results / "online" / "transitions.parquet")
    # Nothing reruns, and the judge alone does where its own settings change.
    assert project.planned("--until", "train_online", config=config) == {}
    config["step_judge"]["learning_rate"] = 1e-5
    planned = project.planned("--until", "train_online", config=config)
    assert planned == {"train_step_judge": 1, "train_online": 1}
