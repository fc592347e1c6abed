"""The evaluation of two policies by four metric networks: one command, resumed where it stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.core.artifacts.schemas import METRIC_SCORES, SUMMARY
from stages.core.artifacts.tables import read_metadata, read_table
from tests.metrics.conftest import publish
from tests.workflow.projects import RUN, Project

METRICS = ("pickscore", "hpsv2", "imagereward", "aesthetics")
NUM_PROMPTS = 200


@pytest.mark.slow
def test_200_prompts_by_four_metrics_are_scored_and_only_what_is_missing_again(
    tmp_path: Path,
) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    published = publish(weights)
    config = {
        "iterations": 0,
        "shapes": {"num_evaluation_captions": NUM_PROMPTS},
        "evaluation": {
            "metrics": list(METRICS),
            "primary_metric": "pickscore",
            "candidate_metric": None,
            "shards": 2,
        },
        "metrics": {metric: published.options(metric) for metric in METRICS},
    }
    project = Project(tmp_path / "project")
    project.folder.mkdir()
    project.make("--quiet", "all", "--", "evaluate", config=config)
    folder = project.results / "evaluation"
    summary = read_table(folder / "summary.parquet", SUMMARY).to_pylist()
    assert {row["metric"] for row in summary} == set(METRICS)
    assert {row["policy"] for row in summary} == {"base", "iter00"}
    assert {row["num_prompts"] for row in summary} == {NUM_PROMPTS}
    for metric in METRICS:
        path = folder / "shapes" / "iter00" / "scores" / f"{metric}.parquet"
        assert len(read_table(path, METRIC_SCORES)) >= NUM_PROMPTS
        assert read_metadata(path)["arguments"]["spec"]["weights"]
    target = ("--", "evaluate")
    assert project.planned(*target, config=config) == {}
    (folder / "shapes/iter00/scores/hpsv2.parquet").unlink()
    planned = project.planned(*target, config=config)
    assert planned["score_metric"] == 1
    assert "generate_evaluation" not in planned
    project.make("--quiet", "all", *target, config=config)
    assert read_table(folder / "summary.parquet", SUMMARY).to_pylist() == summary
    (folder / "shapes/base/images/shard-1.parquet").unlink()
    planned = project.planned(*target, config=config)
    assert planned["generate_evaluation"] == 1
    assert planned["score_metric"] == len(METRICS)
    assert "train_seed" not in planned


@pytest.mark.slow
def test_every_policy_is_compared_with_one_of_another_run(
    finished: Project, tmp_path: Path
) -> None:
    project = finished.copy(tmp_path / "copy")
    config = {
        "run": "second",
        "iterations": 0,
        "train_seed": {"learning_rate": 5.0e-4},
        "evaluation": {"compare_with": [f"results/{RUN}/iter02"]},
    }
    project.make("--quiet", "all", config=config)
    second = project.folder / "results" / "second"
    rows = read_table(second / "evaluation/summary.parquet", SUMMARY).to_pylist()
    compared = {
        (row["metric"], row["policy"]): row for row in rows if row["baseline"] == f"{RUN}/iter02"
    }
    metrics = ("total", "caption_match")
    assert set(compared) == {(m, policy) for m in metrics for policy in ("base", "iter00")}
    for (metric, policy), row in compared.items():
        ours, theirs = (
            prompt_means(run / "evaluation/shapes" / name / "scores" / f"{metric}.parquet")
            for run, name in ((second, policy), (project.results, "iter02"))
        )
        gaps = [ours[name] - theirs[name] for name in theirs]
        assert row["num_prompts"] == len(gaps) == 16
        assert row["difference"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-6)
        assert row["num_wins"] == sum(gap > 0 for gap in gaps)
    report = (second / "report.html").read_text()
    assert "Against other runs" in report
    assert f"{RUN}/iter02" in report
    assert project.planned(config=config) == {}


def prompt_means(path: Path) -> dict[str, float]:
    """Each prompt's mean score."""
    scores: dict[str, list[float]] = {}
    for row in read_table(path, METRIC_SCORES).to_pylist():
        scores.setdefault(row["prompt_id"], []).append(row["score"])
    return {name: sum(values) / len(values) for name, values in scores.items()}
