"""The smallest DAG on a real Slurm of one node, with one job cancelled and one preempted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest

from stages.core.progress.journal import read_calls
from stages.core.progress.time_left import gpu_hours
from tests.cluster.conftest import Config, tables, weights
from tests.cluster.one_node import Cluster, one_node, why_not
from tests.core.test_devices import STAGE
from tests.workflow.projects import ROOT, RUN, Project, environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    # There is one at a time, and another test process would wait for it.
    pytest.mark.xdist_group("slurm"),
]

GPUS = 4
AT_ONCE = (
    *("--jobs", "3", "--slurm-init-seconds-before-status-checks", "3"),
    *("--seconds-between-status-checks", "3", "--latency-wait", "10"),
)
"""What fits this machine; all else is the profile's."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A one-node cluster with pretend GPUs."""
    pytest.importorskip("snakemake_executor_plugin_slurm")
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with one_node(GPUS) as running:
        yield running


def test_gpus_shared_by_snakemake_are_refused_on_a_scheduler(
    cluster: Cluster, tmp_path: Path
) -> None:
    profile = ("--profile", str(ROOT / "profiles" / "slurm"))
    done = Project(tmp_path).call(*profile, config={"execution": {"jobs_per_gpu": 2}})
    assert done.returncode != 0
    assert "execution.jobs_per_gpu is 2" in done.stdout
    assert "Traceback" not in done.stdout
    assert not list(tmp_path.glob("results/*"))


def interrupt(
    cluster: Cluster, head: subprocess.Popen[str], what: str, until: Path | None, *command: str
) -> int:
    """Call a command of Slurm on a job as soon as it runs and a file is there; the job's number."""
    deadline = time.monotonic() + 900
    while True:
        running = [
            job for job, state, rule in cluster.queue() if state == "RUNNING" and what in rule
        ]
        if running and (until is None or until.is_file()):
            subprocess.run([*command, running[0]], check=True)
            return int(running[0])
        assert head.poll() is None, head.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_smallest_dag_survives_a_cancelled_training_and_a_preemption_and_ends_as_a_local_run(
    cluster: Cluster, finished: Project, config: Config, tmp_path: Path
) -> None:
    remote = Project(tmp_path)
    profile = ("--profile", str(ROOT / "profiles" / "slurm"))
    head = subprocess.Popen(
        remote.command(*profile, *AT_ONCE, config=config),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(),
    )  # fmt: skip
    state = remote.folder / f"work/{RUN}/iter00/state.json"
    interrupt(cluster, head, "train_seed", state, "scancel")
    preempted = interrupt(cluster, head, "shard", None, "scontrol", "requeue")
    said, _ = head.communicate()
    assert head.returncode == 0, said

    ends = {(what, state) for _, state, what in cluster.queue()}
    assert {end for end in ends if end[1] != "COMPLETED"} == {("rule_train_seed", "CANCELLED")}
    assert ("rule_train_seed", "COMPLETED") in ends
    assert [stay.job for stay in cluster.stays()].count(preempted) == 2
    assert "continuing from step" in (remote.logs / "iter00" / "train_seed.log").read_text()
    made, expected = tables(remote), tables(finished)
    assert len(made) > 20
    for name, rows in made.items():
        assert rows == expected[name], name
    for policy in ("iter00", "iter01"):
        folders = [project.results / policy / "policy" for project in (remote, finished)]
        assert weights(folders[0]) == weights(folders[1])
    assert_own_devices(cluster)
    assert_shards_in_one_job(cluster, remote)
    assert_the_journal_is_whole(remote)
    assert not list(remote.folder.rglob("pwned"))


def assert_own_devices(cluster: Cluster) -> None:
    """No GPU was two jobs' at a time, though jobs with GPUs did run at the same time."""
    stays = [stay for stay in cluster.stays() if stay.gpus]
    assert len(stays) > 5
    pairs = list(combinations(stays, 2))
    assert not [pair for pair in pairs if pair[0].overlaps(pair[1])]
    assert [a for a, b in pairs if a.begin < b.end and b.begin < a.end]


def assert_shards_in_one_job(cluster: Cluster, project: Project) -> None:
    """Sampling and scoring of a shard saw the GPU of one job; small stages were no jobs."""
    rules = [what for *_, what in cluster.queue()]
    assert len([what for what in rules if "shard" in what]) == 2
    assert not [what for what in rules if re.search("select_prompts|write_report", what)]
    for shard in (0, 1):
        seen = [
            re.search(r"CUDA_VISIBLE_DEVICES is (\d),", log.read_text())
            for log in sorted((project.logs / "iter01").glob(f"s*_candidates-{shard}.log"))
        ]
        assert len(seen) == 2
        assert all(seen)
        assert len({match[1] for match in seen if match}) == 1


def assert_the_journal_is_whole(project: Project) -> None:
    """It tells of jobs at the scheduler as of those beside Snakemake, and of what failed and was tried again."""
    [call] = read_calls(project.logs / "jobs.jsonl")
    assert call.outcome == "finished"
    assert call.seconds.keys() == call.jobs.keys()
    assert not call.failed
    assert (call.limits.cores, call.limits.jobs) == (None, 3)
    grouped = {call.jobs[number].rule for number, size in call.group_sizes.items() if size == 2}
    assert grouped == {"sample_candidates", "score_candidates"}
    by_rule = {job.rule: job for job in call.jobs.values()}
    assert by_rule["select_prompts"].is_local
    assert not by_rule["train_seed"].is_local
    assert by_rule["train_seed"].gpus == 1
    assert gpu_hours(call) > 0


def test_stages_inside_one_allocation_lease_among_its_devices(
    cluster: Cluster, tmp_path: Path
) -> None:
    stage = '"$0" -c "$1" "$CUDA_VISIBLE_DEVICES"'
    both = f"{stage} & {stage} & {stage} & sleep 8; kill $(jobs -p)"
    done = subprocess.run(
        ["srun", "-n1", "--gpus=2", "bash", "-c", both, sys.executable, STAGE],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert sorted(done.stdout.split()) == ["0", "1"], done  # and the third waited
    [folder] = tmp_path.glob("sail-devices-*/slurm-*")
    assert {path.stem for path in folder.glob("[01].lock")} == {"0", "1"}
