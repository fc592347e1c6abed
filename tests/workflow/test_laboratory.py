"""The laboratory's own workflow: which runs it plans, in which order, and what it refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.workflow.projects import ROOT, Project, environment

LAB = ROOT / "workflow" / "lab" / "Snakefile"


def dry_run(folder: Path, *config: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        str(LAB),
        "--directory",
        str(folder),
    ]
    command += [
        "--cores",
        "2",
        "--dry-run",
        "--printshellcmds",
        "--config",
        f"page={folder}/page.md",
    ]
    return subprocess.run(
        [*command, *config], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | environment(), check=False,
    )  # fmt: skip


def test_arms_of_a_seed_adopt_its_policy_0_and_wait_for_it(tmp_path: Path) -> None:
    done = dry_run(tmp_path, "only=table6", "seeds=7")
    assert done.returncode == 0, done.stdout
    jobs = re.findall(r"rule run_experiment:\n +input: (.*)\n +output: (.*)\n", done.stdout)
    assert len(jobs) == 5
    inputs = {Path(output).stem: named for named, output in jobs}
    owner = "lab-table6-none-7"
    assert inputs.pop(owner) == f"work/lab/{owner}.yaml"
    assert all(f"results/lab/runs/{owner}.json" in named for named in inputs.values())
    assert done.stdout.count(f"policy: results/{owner}/iter00/policy") == 4
    assert "--configfile" in done.stdout
    assert "summarise_laboratory" in done.stdout


def test_an_experiment_that_is_not_there_is_told(tmp_path: Path) -> None:
    done = dry_run(tmp_path, "only=table9")
    assert done.returncode != 0
    assert "only: there is no experiment table9; expected some of" in done.stdout


def test_the_pipelines_own_workflow_calls_it(tmp_path: Path) -> None:
    assert Project(tmp_path).planned("--", "lab") == {"lab": 1}
