"""Each line of docs/reruns.md: a change to a finished run plans exactly the jobs that the line says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.core.plan.configuration import merged
from tests.workflow.plans import Job, Planner, followers, planner
from tests.workflow.projects import ROOT, RUN, Project
from tests.workflow.rerun_table import PAGE, ROWS, Row, in_step, of_ones_own, recorded

pytestmark = pytest.mark.xdist_group("finished")  # one process makes its run for all

PROMISED = (
    "seed/preferences.parquet", "seed/holdout.parquet", "seed/preferences_latents.parquet",
    "seed/import.json", "prompts/iter01.parquet", "evaluation/shapes/prompts.parquet",
    "iter00/policy/manifest.json", "iter00/training.parquet", "iter01/candidates/shard-1.parquet",
    "iter01/scores/shard-1.parquet", "iter01/pairs.parquet", "iter01/preferences.parquet",
    "iter02/policy/manifest.json", "iter02/training.parquet", "iter02/held_out_curve.parquet",
    "evaluation/shapes/base/images/shard-0.parquet",
    "evaluation/shapes/iter02/scores/total.parquet", "evaluation/holdout/iter02.parquet",
    "evaluation/summary.parquet", "evaluation/guards.parquet", "report.html", "config.json",
    "export/iter02/diffusers/manifest.json",
)  # fmt: skip
"""The artifacts of the design, one of each kind."""


@dataclass(frozen=True)
class World:
    """A finished run, its config, and all its jobs."""

    project: Project
    config: dict[str, Any]
    jobs: list[Job]


@pytest.fixture(scope="module")
def plans() -> Iterator[Planner]:
    with planner() as started:
        yield started


@pytest.fixture(scope="module")
def shapes(finished: Project, plans: Planner) -> World:
    return World(finished, {}, plans.plan(finished.arguments("--forceall")))


@pytest.fixture(scope="module")
def own(finished: Project, plans: Planner, tmp_path_factory: pytest.TempPathFactory) -> World:
    project, config = of_ones_own(finished, tmp_path_factory.mktemp("own"))
    jobs = plans.plan(project.arguments("--forceall", config=config))
    assert not plans.plan(project.arguments(config=config))
    return World(project, config, jobs)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.change)
def test_a_change_reruns_what_depends_on_it_and_nothing_else(
    row: Row, plans: Planner, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    world: World = request.getfixturevalue("own" if row.is_own else "shapes")
    config = merged(world.config, row.config)
    project = row.edit(world.project, tmp_path) if row.edit else world.project
    flags = project.arguments(*row.flags, config=config)
    planned = {path for job in plans.plan(flags) for path in job.outputs}
    jobs = plans.plan([*flags, "--forceall"]) if row.reshapes else world.jobs
    assert planned == followers(jobs, row.starts(jobs))


@pytest.mark.slow
def test_the_target_all_names_every_file_that_the_run_has_made(
    shapes: World, plans: Planner
) -> None:
    """Snakemake would not miss a deleted file that is no target and has been read by all."""
    every = plans.jobs(shapes.project.arguments("--forceall"))
    [targets] = [set(job.inputs) for job in every if job.rule == "all"]
    assert recorded(shapes.project) <= targets
    assert {f"results/{RUN}/{name}" for name in PROMISED} <= targets


def test_the_page_is_in_step_with_the_rows() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == in_step(page), "run python -m tests.workflow.rerun_table"


def test_what_a_rows_jobs_are_followed_by() -> None:
    jobs = [
        Job("a", (), ("a1",)), Job("b", ("a1",), ("b1", "b2")), Job("c", ("b2",), ("c1",)),
        Job("d", (), ("d1",)),
    ]  # fmt: skip
    row = Row(section="", change="", begins=("b (b2)",))
    assert followers(jobs, row.starts(jobs)) == {"b1", "b2", "c1"}
    assert followers(jobs, []) == set()
    with pytest.raises(AssertionError, match="no job is 'e'"):
        Row(section="", change="", begins=("e",)).starts(jobs)


def test_every_block_of_the_config_has_a_row() -> None:
    schema = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())
    changed = {key for row in ROWS if row.begins for key in row.config}
    assert set(schema["properties"]) - changed == {"execution", "notify"}
    assert any("execution" in row.config for row in ROWS if not row.begins)
