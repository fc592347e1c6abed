"""What runs, what reruns after a change, and what an interrupted run ends with."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stages.core.artifacts.provenance import policy_digest
from stages.core.artifacts.schemas import PAIR_LATENTS, SUMMARY, TRAINING_PAIRS
from stages.core.artifacts.tables import read_table
from stages.core.evaluation.guards import GUARDS_TABLE
from tests.builders import Row, read_rows
from tests.workflow.projects import RUN, Project, environment

pytestmark = pytest.mark.xdist_group("finished")  # one process makes its run for all

FINAL_TABLES = ("evaluation/summary.parquet", "evaluation/guards.parquet")


def contents(project: Project) -> dict[str, object]:
    """Everything of value that must not depend on how a run went, without times and paths."""
    results = project.results
    tables = [*FINAL_TABLES, "iter01/preferences.parquet", "iter02/preferences.parquet"]
    found: dict[str, object] = {name: pq.read_table(results / name).to_pylist() for name in tables}
    for manifest in sorted(results.glob("iter*/policy/manifest.json")):
        weights = manifest.parent / "unet" / "diffusion_pytorch_model.safetensors"
        found[str(weights.relative_to(results))] = hashlib.sha256(weights.read_bytes()).hexdigest()
    return found


def test_the_run_leaves_what_the_design_promises(finished: Project) -> None:
    results = finished.results
    summary = read_table(results / "evaluation/summary.parquet", SUMMARY).to_pylist()
    assert {row["policy"] for row in summary} == {"base", "iter00", "iter01", "iter02"}
    guards = read_table(results / "evaluation/guards.parquet", GUARDS_TABLE).to_pylist()
    assert [row["iteration"] for row in guards] == [0, 1, 2]
    mix = read_table(results / "iter01/preferences.parquet", TRAINING_PAIRS).to_pylist()
    assert [row["source"] for row in mix].count("generated") == 4
    assert [row["source"] for row in mix].count("human") == 1  # a quarter, to a whole pair
    for policy in ("iter00", "iter01", "iter02"):
        policy_digest(results / policy / "policy")
    assert "<svg" in (results / "report.html").read_text()
    assert not list(finished.folder.rglob("*.part"))


def test_a_second_call_does_nothing(finished: Project) -> None:
    assert finished.planned() == {}


@pytest.fixture
def without_a_shard(finished: Project, tmp_path: Path) -> Project:
    project = finished.copy(tmp_path / "copy")
    (project.results / "iter02/candidates/shard-1.parquet").unlink()
    return project


def test_a_deleted_shard_is_planned_with_what_depends_on_it(without_a_shard: Project) -> None:
    planned = without_a_shard.planned()
    assert planned["sample_candidates"] == 1
    assert planned["score_candidates"] == 1
    assert planned["select_pairs"] == planned["update_policy"] == 1
    assert "train_seed" not in planned
    assert "import_preferences" not in planned


@pytest.mark.slow
def test_a_deleted_shard_is_rebuilt_and_the_run_ends_as_it_was(
    finished: Project, without_a_shard: Project
) -> None:
    without_a_shard.make("--quiet", "all")
    assert contents(without_a_shard) == contents(finished)


def test_dpo_beta_of_the_update_leaves_the_first_candidates_alone(finished: Project) -> None:
    planned = finished.planned(config={"update_policy": {"dpo_beta": 4000.0}})
    assert planned["sample_candidates"] == 2  # the two shards of iteration 2
    assert planned["score_candidates"] == 2
    assert planned["update_policy"] == 2
    assert "train_seed" not in planned


def test_another_iteration_extends_and_retrains_nothing(finished: Project) -> None:
    planned = finished.planned(config={"iterations": 3, "prompts": {"per_iteration": [4, 4, 4]}})
    assert planned["update_policy"] == planned["mix_preferences"] == 1
    assert planned["sample_candidates"] == 2
    assert planned["generate_evaluation"] == 1
    assert "train_seed" not in planned
    assert "import_preferences" not in planned


def heed_ctrl_c() -> None:
    """A job in a shell's background inherits that it ignores Ctrl-C; in a terminal it does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupt(project: Project, until: str, *target: str) -> None:
    """Start Snakemake, press Ctrl-C as soon as a file appears, and wait for its end."""
    head = subprocess.Popen(
        project.command("--quiet", "all", *target, config={"notify": "tee -a told.jsonl"}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(),
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )
    deadline = time.monotonic() + 300
    while not (project.folder / until).is_file():
        assert head.poll() is None, head.communicate()[0].decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if until.endswith(".log"):
        time.sleep(1)  # a Python that has just been started ends with words of its own
    os.killpg(head.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
    said = head.communicate(timeout=120)[0].decode().splitlines()
    assert head.returncode != 0
    assert said[-1] == "Stopped. The same command continues from here."
    [told] = map(json.loads, (project.folder / "told.jsonl").read_text().splitlines())
    assert told["event"] == "interrupted"
    assert not [line for line in said if "Traceback" in line or "rror" in line]
    assert not list(project.folder.rglob("*.part"))


def test_ctrl_c_in_a_training_loses_nothing_that_was_saved(
    finished: Project, tmp_path: Path
) -> None:
    project = finished.copy(tmp_path / "copy")
    policy = project.results / "iter00" / "policy"
    shutil.rmtree(policy)
    target = ("--", f"results/{RUN}/iter00/policy/manifest.json")
    interrupt(project, f"work/{RUN}/iter00/state.json", *target)
    assert not policy.exists()
    done = project.call("--quiet", "rules", *target)
    assert done.returncode == 0, done.stdout
    assert "continuing from step" in done.stdout
    for name in ("training.parquet", "held_out_curve.parquet"):
        tables = [read_rows(p.results / "iter00" / name) for p in (project, finished)]
        for row in (*tables[0], *tables[1]):
            row.pop("pairs_per_second", None)
        assert tables[0] == tables[1]
    assert policy_digest(policy) == policy_digest(finished.results / "iter00" / "policy")


@pytest.mark.slow
def test_ctrl_c_and_the_same_command_again_end_with_the_same_numbers(
    finished: Project, tmp_path: Path
) -> None:
    project = finished.copy(tmp_path / "copy")
    (project.results / "iter02/candidates/shard-0.parquet").unlink()
    log = project.logs / "iter02" / "sample_candidates-0.log"
    log.unlink()
    interrupt(project, str(log.relative_to(project.folder)))
    assert not (project.results / "iter02/candidates/shard-0.parquet").exists()
    project.make("--quiet", "all")
    assert contents(project) == contents(finished)


def in_order(paths: list[Path]) -> list[Row]:
    """All rows of the shards of a table, by prompt and candidate or sample."""
    rows = [row for path in paths for row in read_rows(path)]
    return sorted(rows, key=lambda row: (row["prompt_id"], row["candidate"]))


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 3])
def test_other_numbers_of_shards_give_the_same_images_rewards_and_pairs(
    finished: Project, tmp_path: Path, shards: int
) -> None:
    """Against the two shards of candidates and the one of evaluation images of the finished run.

    The third shard of two batches is empty.
    """
    project = finished.copy(tmp_path / "copy")
    for folder in ("iter01/candidates", "iter01/scores", "evaluation/shapes/base"):
        shutil.rmtree(project.results / folder)
    names = ("iter01/pairs.parquet", "evaluation/shapes/base/scores/total.parquet")
    config = {"sample_candidates": {"shards": shards}, "evaluation": {"shards": 4 - shards}}
    targets = [f"results/{RUN}/{name}" for name in names]
    project.make("--quiet", "all", "--", *targets, config=config)
    for folder, number in (
        ("iter01/candidates", shards),
        ("iter01/scores", shards),
        ("evaluation/shapes/base/images", 4 - shards),
    ):
        paths = list((project.results / folder).iterdir())
        assert len(paths) == number
        expected = in_order(list((finished.results / folder).iterdir()))
        assert in_order(paths) == expected  # images, latents, errors: bit by bit
    for name in names:
        assert read_rows(project.results / name) == read_rows(finished.results / name)


@pytest.mark.slow
def test_human_pairs_that_shards_encode_have_the_same_latents(
    finished: Project, tmp_path: Path
) -> None:
    """With fewer batches than shards, too; the shards are gone after it."""
    project = finished.copy(tmp_path / "copy")
    name = "seed/preferences_latents.parquet"
    (project.results / name).unlink()
    config = {"preferences": {"shards": 3}}
    project.make("--quiet", "all", "--", f"results/{RUN}/{name}", config=config)
    found, expected = (
        read_table(each.results / name, PAIR_LATENTS) for each in (project, finished)
    )
    assert found.equals(expected)
    assert not list(project.results.rglob("preferences_latents/*.parquet"))
