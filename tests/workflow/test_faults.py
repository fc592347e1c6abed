"""Full and read-only disks, SIGTERM, killed and rival Snakemakes, jumping clocks: nothing is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stages.core.health.files import artifacts, check_artifact
from tests.chaos.contents import contents, differences
from tests.chaos.harness import stages_in, wait_for_all
from tests.small_disks import mounted, resize
from tests.workflow.projects import RUN, Project, environment

POLICY = f"results/{RUN}/iter00/policy/manifest.json"
SHARD = f"results/{RUN}/iter01/candidates/shard-0.parquet"

TO_MAKE = {
    POLICY: lambda project: shutil.rmtree(project.results / "iter00" / "policy"),
    SHARD: lambda project: (project.folder / SHARD).unlink(),
}
"""An artifact of a training and one of a sampling, and how it is lost."""


def start(project: Project, *flags: str) -> subprocess.Popen[str]:
    """Snakemake at work, in a process group of its own."""
    return subprocess.Popen(
        project.command("--quiet", "rules", *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,
    )


def until(is_so: Callable[[], bool], head: subprocess.Popen[str]) -> None:
    """Wait for something that a Snakemake at work will do."""
    deadline = time.monotonic() + 300
    while not is_so():
        assert head.poll() is None, head.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def state_of(project: Project) -> Path:
    """What a training has saved."""
    return project.folder / "work" / RUN / "iter00" / "state.json"


def has_begun(project: Project, target: str) -> Callable[[], bool]:
    """Whether the training has saved a state, or the sampling has begun."""
    if target == POLICY:
        return state_of(project).is_file
    log = project.logs / "iter01" / "sample_candidates-0.log"
    log.unlink(missing_ok=True)
    return lambda: log.is_file() and any(stages_in(project.folder))


@pytest.mark.slow
@pytest.mark.parametrize("target", TO_MAKE)
def test_a_full_disk_damages_nothing_and_with_more_space_the_run_goes_on(
    finished: Project, tmp_path: Path, target: str
) -> None:
    project = finished.copy(tmp_path / "copy")
    TO_MAKE[target](project)
    results, kept = project.folder / "results", tmp_path / "kept"
    results.rename(kept)
    results.mkdir()
    with mounted(results, size="1g"):
        shutil.copytree(kept, results, dirs_exist_ok=True)
        before = contents(project.results)
        used = shutil.disk_usage(results).used
        resize(results, str(used + 4096))
        done = project.call("--quiet", "all", "--", target)
        assert done.returncode != 0
        assert "could not be written: the disk is full; free some space" in done.stdout
        assert "Traceback" not in done.stdout
        after = contents(project.results)
        assert not [name for name in differences(before, after) if "missing" not in name]
        resize(results, "1g")
        project.make("--quiet", "all", "--", target)
        assert differences(contents(finished.results), contents(project.results)) == []


@pytest.mark.slow
def test_a_read_only_results_folder_is_refused_before_any_work(
    finished: Project, tmp_path: Path
) -> None:
    project = finished.copy(tmp_path / "copy")
    shutil.rmtree(project.folder / "results")
    (project.folder / "results").mkdir()
    with mounted(project.folder / "results", options="ro"):
        done = project.call("--quiet", "rules")  # 'all' would hide Snakemake's own message
        assert done.returncode != 0
        assert f"results/{RUN} cannot be written to: the file system is mounted read-only" in (
            done.stdout
        )
        assert "done, " not in done.stdout  # as every stage says
        assert project.planned()  # a plan needs no right to write


@pytest.mark.slow
@pytest.mark.parametrize("target", TO_MAKE)
def test_sigterm_to_everything_ends_it_in_time_and_the_next_call_makes_the_same(
    finished: Project, tmp_path: Path, target: str
) -> None:
    """As Slurm sends it to all processes of a job, and spot instances before they go."""
    project = finished.copy(tmp_path / "copy")
    expected = contents(finished.results)
    TO_MAKE[target](project)
    head = start(project, "--", target)
    until(has_begun(project, target), head)
    asked = time.monotonic()
    os.killpg(head.pid, signal.SIGTERM)
    output, _ = head.communicate(timeout=60)
    assert time.monotonic() - asked < 30
    assert head.returncode != 0
    assert not wait_for_all(project.folder)
    assert not list(project.folder.rglob("*.part"))
    if target == POLICY:
        assert "stopped by SIGTERM: the training's state of step" in output
        assert state_of(project).is_file()
    done = project.call("--quiet", "rules", "--", target)
    assert done.returncode == 0, done.stdout
    assert ("continuing from step" in done.stdout) == (target == POLICY)
    name = str(Path(target).relative_to(f"results/{RUN}"))
    assert contents(project.results)[name] == expected[name]


@pytest.mark.slow
@pytest.mark.parametrize("target", TO_MAKE)
def test_a_killed_snakemake_takes_its_stages_along_and_the_same_command_goes_on(
    finished: Project, tmp_path: Path, target: str
) -> None:
    project = finished.copy(tmp_path / "copy")
    TO_MAKE[target](project)
    head = start(project, "--", target)
    until(has_begun(project, target), head)
    head.kill()
    head.communicate()
    assert not wait_for_all(project.folder)
    locks = list((project.folder / ".snakemake" / "locks").glob("*.lock"))
    assert locks  # which a user had to remove by --unlock
    done = project.call("--quiet", "rules", "--", target)
    assert done.returncode == 0, done.stdout
    assert f"the last snakemake here was killed; its {len(locks)} locks are removed" in done.stdout
    name = str(Path(target).relative_to(f"results/{RUN}"))
    assert contents(project.results)[name] == contents(finished.results)[name]


@pytest.mark.slow
def test_a_second_snakemake_is_refused_and_the_first_goes_on_unharmed(
    finished: Project, tmp_path: Path
) -> None:
    project = finished.copy(tmp_path / "copy")
    TO_MAKE[POLICY](project)
    first = start(project, "--", POLICY)
    until(has_begun(project, POLICY), first)
    [stage] = stages_in(project.folder)
    stage.suspend()  # or the first might be done before the second has started
    second = project.call("--quiet", "rules", "--", POLICY)
    stage.resume()
    assert second.returncode != 0
    assert "LockException" in second.stdout
    assert "locks are removed" not in second.stdout
    output, _ = first.communicate(timeout=300)
    assert first.returncode == 0, output
    name = "iter00/policy/manifest.json"
    assert contents(project.results)[name] == contents(finished.results)[name]


@pytest.mark.slow
def test_of_two_snakemakes_without_locks_one_makes_the_run_and_the_other_is_refused(
    finished: Project, tmp_path: Path
) -> None:
    project = finished.copy(tmp_path / "copy")
    for name in ("iter01/candidates", "evaluation/holdout"):
        shutil.rmtree(project.results / name)
    heads = [start(project, "--nolock") for _ in range(2)]
    outputs = [head.communicate(timeout=600)[0] for head in heads]
    assert sorted(head.returncode for head in heads) == [0, 1], outputs
    [refused] = [text for text, head in zip(outputs, heads, strict=True) if head.returncode]
    assert f"makes the run '{RUN}' in this folder" in refused
    assert differences(contents(finished.results), contents(project.results)) == []


@pytest.mark.slow
def test_after_another_run_has_ended_beside_it_a_run_is_still_its_first_snakemakes(
    finished: Project, tmp_path: Path
) -> None:
    """When the other one ends, Snakemake removes its lock of the first."""
    project = finished.copy(tmp_path / "copy")
    TO_MAKE[POLICY](project)
    first = start(project, "--", POLICY)
    until(has_begun(project, POLICY), first)
    [stage] = stages_in(project.folder)
    stage.suspend()
    others = project.call(
        "--quiet", "rules", "--", "results/other/world/pool.txt", config={"run": "other"}
    )
    again = project.call("--quiet", "rules", "--", POLICY)
    plan = project.call("--dry-run", "--quiet", "rules", "--", POLICY)
    stage.resume()
    assert others.returncode == 0, others.stdout
    assert again.returncode != 0
    assert f"makes the run '{RUN}' in this folder" in again.stdout
    assert "Traceback" not in again.stdout
    assert plan.returncode == 0, plan.stdout  # who only looks is no rival
    output, _ = first.communicate(timeout=300)
    assert first.returncode == 0, output
    name = "iter00/policy/manifest.json"
    assert contents(project.results)[name] == contents(finished.results)[name]


DAY = 86400.0


@pytest.mark.parametrize(
    "days",
    [
        pytest.param(-10_000, marks=pytest.mark.long),
        1,
        pytest.param(10_000, marks=pytest.mark.long),
    ],
)
def test_a_clock_that_jumps_between_two_jobs_reruns_nothing(
    finished: Project, tmp_path: Path, days: int
) -> None:
    """Every file that is input and output of something seems newer than what was made of it, or older."""
    project = finished.copy(tmp_path / "copy")
    for path in (p for p in project.results.rglob("*") if p.is_file()):
        time_of = path.stat().st_mtime + days * DAY * (path.parent.name != "evaluation")
        os.utime(path, (time_of, time_of))
    assert project.planned() == {}


def test_another_content_under_an_older_time_is_found_by_the_doctor(
    finished: Project, tmp_path: Path
) -> None:
    """Snakemake looks at content only where the time is newer: `cp -p` of an older file escapes it."""
    project = finished.copy(tmp_path / "copy")
    path = project.results / "iter01" / "pairs.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take(list(reversed(range(len(table))))), path)
    os.utime(path, (DAY, DAY))
    assert project.planned() == {}
    found = [
        finding
        for artifact in artifacts(project.results)
        for finding in check_artifact(artifact, project.folder)
    ]
    assert any("was made from another results/test/iter01/pairs.parquet" in f.what for f in found)
    os.utime(path)  # the time of now
    assert "mix_preferences" in project.planned()
