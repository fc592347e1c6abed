"""The laboratory's own workflow: which runs it plans, in which order, and what it refuses."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from stages.core.laboratory.experiments import chosen, plan_runs, read_base, read_experiment
from stages.core.laboratory.memory import Measured, as_text, of_results
from tests.workflow.projects import ROOT, Project, environment
from tests.workflow.warm import warm_python

LAB = ROOT / "workflow" / "lab" / "Snakefile"


def dry_run(folder: Path, *config: str) -> subprocess.CompletedProcess[str]:
    python = warm_python()
    command = [
        str(python),
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
        env=environment(python), check=False,
    )  # fmt: skip


def test_arms_of_a_seed_adopt_its_policy_0_and_wait_for_it(tmp_path: Path) -> None:
    done = dry_run(tmp_path, "only=table6", "seeds=7")
    assert done.returncode == 0, done.stdout
    jobs = re.findall(r"rule run_experiment:\n +input: (.*)\n +output: (.*)\n", done.stdout)
    assert len(jobs) == 5
    inputs = {Path(output).stem: named for named, output in jobs}
    owner = "lab-table6-none-7"
    base = ROOT / "config/config.yaml"
    assert inputs.pop(owner) == f"{base}, work/lab/{owner}.yaml"
    assert all(named.startswith(f"{base}, ") for named in inputs.values())
    assert all(f"results/lab/runs/{owner}.json" in named for named in inputs.values())
    assert done.stdout.count(f"policy: results/{owner}/iter00/policy") == 4
    kept = re.findall(r"--command '(.*?)'", done.stdout)
    assert len(kept) == 5
    assert all(words.startswith("snakemake --configfile config/config.yaml ") for words in kept)
    assert "--configfile" in done.stdout
    assert "summarise_laboratory" in done.stdout


def test_what_an_owner_has_trained_again_is_adopted_again(tmp_path: Path) -> None:
    text = dry_run(tmp_path, "only=table6", "seeds=7").stdout
    line = next(
        line
        for line in text.splitlines()
        if "mkdir -p results/lab/begun" in line and "lab-table6-none-7/iter00" in line
        and "touch results/lab/begun/lab-table6-none-7;" not in line
    )  # fmt: skip
    decision = re.search(r"again='';.*? fi;", line)
    assert decision is not None
    own, other = (tmp_path / path for path in re.findall(r"(\S+)\s-nt (\S+)", decision[0])[0])
    asked = ["bash", "-euo", "pipefail", "-c", f"{decision[0]} echo $again"]

    def answer() -> str:
        return subprocess.check_output(asked, cwd=tmp_path, text=True).strip()

    for path in (own, other):
        path.parent.mkdir(parents=True)
    own.touch()
    assert answer() == ""  # nothing was adopted yet
    other.touch()
    os.utime(own, (1, 1))
    assert answer() == ""
    os.utime(other, (0, 0))
    assert answer() == "--forcerun adopt_policy"


def test_a_run_that_was_measured_before_is_not_made_again(tmp_path: Path) -> None:
    experiment = read_experiment(ROOT / "config" / "lab" / "table6.yaml")
    runs = plan_runs(chosen([experiment], [7]), read_base([ROOT / "config" / "config.yaml"]))
    other = next(run for run in runs if run.owner != run.name)
    earlier = tmp_path / "earlier.jsonl"
    facts = {"command": None, "commit": None, "machine": None, "run_seconds": None}
    measured = Measured(config=of_results(other.config), measures={}, **facts)
    earlier.write_text(as_text([measured]))
    made = dry_run(tmp_path, "only=table6", "seeds=7", f"earlier={earlier}").stdout
    outputs = re.findall(r"rule run_experiment:\n +input: .*\n +output: .*/(.*).json\n", made)
    assert {*outputs} == {run.name for run in runs} - {other.name}
    assert f"--earlier {earlier}" in made


def test_an_experiment_that_is_not_there_is_told(tmp_path: Path) -> None:
    done = dry_run(tmp_path, "only=table9")
    assert done.returncode != 0
    assert "only: there is no experiment table9; expected some of" in done.stdout


def test_the_pipelines_own_workflow_calls_it(tmp_path: Path) -> None:
    assert Project(tmp_path).planned("--", "lab") == {"lab": 1}
