"""A run that collapses, by a learning rate that wrecks the policy: stopped, resumed, rolled back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stages.core.artifacts.provenance import policy_digest
from stages.core.artifacts.schemas import TRAINING_PAIRS
from stages.core.artifacts.tables import read_table
from stages.core.evaluation.gates import read_gate
from stages.core.evaluation.guards import GUARDS_TABLE
from stages.core.progress.journal import read_calls
from tests.workflow.projects import Project

pytestmark = pytest.mark.xdist_group("gates")  # one process makes its run for all

LENIENT = {
    "min_reward_accuracy": 0.0,  # four held-out pairs tell nothing
    "max_confident_share": 1.0,
    "min_diversity_share": 0.0,
    "max_blank_share": 1.0,
}


def collapsing(on_collapse: str, max_drift: float = 0.5) -> dict[str, Any]:
    """Iteration 0 drifts by less than 0.1 from the base, later ones by more than 1."""
    return {
        "update_policy": {"learning_rate": 0.01},
        "guards": {"on_collapse": on_collapse, "max_drift": max_drift, **LENIENT},
    }


@pytest.mark.slow
def test_only_a_gate_plans_gates(tmp_path: Path) -> None:
    project = Project(tmp_path)
    assert not {"check_collapse", "start_iteration"} & set(project.planned())
    planned = project.planned(config={"guards": {"on_collapse": "stop"}})
    assert (planned["check_collapse"], planned["start_iteration"]) == (3, 2)
    assert planned["update_policy"] == 2


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The run after the call that the gate ended."""
    project = Project(tmp_path_factory.mktemp("stopped"))
    config = collapsing("stop") | {"notify": "tee -a told.jsonl"}
    done = project.call("--quiet", "rules", config=config)
    assert done.returncode != 0
    words = " ".join(done.stdout.split())
    assert "the run ends after iteration 1, as guards.on_collapse is 'stop'" in words
    assert "iter01 has drifted" in words
    assert "(limit 0.5)" in words
    assert "The last good policy is iter00; all that was made is kept" in words
    return project


@pytest.mark.slow
def test_a_stopped_run_keeps_what_it_made_and_starts_nothing(stopped: Project) -> None:
    assert read_gate(stopped.results / "iter00/gate.json").go_on_from == "iter00"
    assert read_gate(stopped.results / "iter01/gate.json").stops
    policy_digest(stopped.results / "iter01/policy")
    assert not (stopped.results / "iter02/candidates").exists()
    assert not (stopped.results / "report.html").exists()


@pytest.mark.slow
def test_a_gate_that_stops_a_run_is_told_as_such(stopped: Project) -> None:
    [told] = [json.loads(line) for line in (stopped.folder / "told.jsonl").read_text().splitlines()]
    assert told["event"] == "stopped"
    assert "iter01 has drifted" in told["reason"]
    assert told["message"].startswith(
        "SAIL run 'test' was stopped by its guards: iter01 has drifted"
    )
    assert [job["rule"] for job in told["failed"]] == ["start_iteration"]
    assert 0 < told["jobs_done"] < told["jobs_planned"]
    [call] = read_calls(stopped.logs / "jobs.jsonl")
    assert call.outcome == "stopped"


@pytest.mark.slow
def test_the_same_call_again_reports_the_iterations_there_are(
    stopped: Project, tmp_path: Path
) -> None:
    project, config = stopped.copy(tmp_path / "copy"), collapsing("stop")
    done = project.call("--quiet", "rules", config=config)
    assert done.returncode == 0, done.stdout
    assert "stopped after iteration 1 of 2 by its guards" in done.stdout
    report = (project.results / "report.html").read_text()
    assert "The guards stopped this run: use iter00" in report
    assert "1 of 2 iterations were not made" in report
    guards = read_table(project.results / "evaluation/guards.parquet", GUARDS_TABLE).to_pylist()
    assert [row["iteration"] for row in guards] == [0, 1]
    assert not (project.results / "iter02/policy").exists()
    assert project.planned(config=config) == {}
    # gentler training: the iteration is made and judged anew
    gentler = config | {"update_policy": {"learning_rate": 1.0e-6}}
    planned = project.planned(config=gentler)
    assert planned["update_policy"] == planned["check_collapse"] == 1
    # a threshold that allows what was found: the run goes on, nothing that was made is made again
    higher = collapsing("stop", max_drift=1e9)
    planned = project.planned(config=higher)
    assert planned["update_policy"] == planned["start_iteration"] == 1
    assert planned["check_collapse"] == 3
    assert planned["sample_candidates"] == planned["score_candidates"] == 2
    assert planned["generate_evaluation"] == 1
    assert not {"train_seed", "encode_preferences"} & set(planned)
    project.make("--quiet", "all", config=higher)
    assert policy_digest(project.results / "iter02/policy")
    assert "none was beyond its threshold" in (project.results / "report.html").read_text()
    assert project.planned(config=higher) == {}


@pytest.mark.slow
def test_a_rollback_goes_on_from_the_last_good_policy(stopped: Project, tmp_path: Path) -> None:
    project, config = stopped.copy(tmp_path / "copy"), collapsing("rollback")
    project.make("--quiet", "all", config=config)
    results = project.results
    good = policy_digest(results / "iter00/policy")
    assert (
        policy_digest(results / "iter02/start") == good != policy_digest(results / "iter01/policy")
    )
    manifest = json.loads((results / "iter02/start/manifest.json").read_text())
    assert manifest["handed_on"] == "iter00"
    assert "has drifted" in manifest["set_aside"][0]
    pairs = read_table(results / "iter02/pairs.parquet", TRAINING_PAIRS, ["policy_digest"])
    assert set(pairs.column("policy_digest").to_pylist()) == {good}
    gates = [read_gate(results / f"iter{i:02d}/gate.json") for i in range(3)]
    assert [gate.go_on_from for gate in gates] == ["iter00"] * 3
    report = (results / "report.html").read_text()
    assert "The guards set a policy aside: use iter00" in report
    assert "iter01 was set aside (guards.on_collapse: rollback); iteration 2 went on from" in report
    assert "iter02 was set aside" in report
    assert project.planned(config=config) == {}
