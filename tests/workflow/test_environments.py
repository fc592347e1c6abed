"""Which environment file each rule has: a metric's pins reach the rules of that metric alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workflow.projects import ROOT, Project, environment

SCRIPT = """
import json, sys
from pathlib import Path
from snakemake.api import ConfigSettings, OutputSettings, ResourceSettings, SnakemakeApi
from snakemake.iocontainers import Wildcards

snakefile, folder, *metrics = sys.argv[1:]
found = {}
for metric in metrics:  # a rule keeps the environment that it was asked for first
    with SnakemakeApi(OutputSettings()) as api:
        workflow = api.workflow(
            resource_settings=ResourceSettings(cores=1), snakefile=Path(snakefile),
            config_settings=ConfigSettings(configfiles=[Path(folder) / "config.yaml"]),
            workdir=Path(folder),
        )._workflow
        wildcards = Wildcards(fromdict={
            "metric": metric, "set": "shapes", "policy": "iter00", "iter": "01", "shard": "0",
            "number": "01", "part": "holdout", "kind": "diffusers",
        })
        for rule in workflow.rules:
            if rule.conda_env is not None:
                file = rule.expand_conda_env(wildcards).file
                path = file.get_path_or_uri(secret_free=True)
                found[f"{rule.name} {metric}"] = str(Path(path).resolve())
print("found " + json.dumps(found))
"""


def environments(folder: Path, *metrics: str) -> dict[tuple[str, str], str]:
    """The environment file of each rule and metric, as Snakemake resolves it."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(ROOT / "Snakefile"), str(folder), *metrics],
        capture_output=True, text=True, env=environment(), check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("found "))
    found = json.loads(line.removeprefix("found "))
    return {tuple(name.split()): path for name, path in found.items()}  # type: ignore[misc]


@pytest.mark.slow
def test_a_metrics_own_environment_is_used_for_that_metric_and_nothing_else(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("channels: [conda-forge]\ndependencies: [python =3.11]\n")
    config = {
        "execution": {"metric_environments": {"caption_match": "own.yaml"}},
        "guards": {"on_collapse": "stop"},
    }
    Project(tmp_path).command(config=config)  # writes config.yaml
    found = environments(tmp_path, "caption_match", "total")
    of_metrics = {"score_metric", "score_candidates_by_metric", "measure_diversity"}
    for (rule, metric), path in found.items():
        if rule == "measure_diversity":  # its features are no metric's here
            continue
        expected = "sail.yaml"
        if rule in of_metrics:
            expected = "own.yaml" if metric == "caption_match" else "metrics.yaml"
        assert Path(path).name == expected, (rule, metric)
    rules = {rule for rule, _ in found}
    assert {"train_seed", "update_policy", "generate_evaluation", "check_collapse"} <= rules
    assert of_metrics <= rules


def test_an_environment_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    config = {"execution": {"metric_environments": {"total": "nowhere.yaml"}}}
    done = Project(tmp_path).call("--dry-run", config=config)
    assert done.returncode != 0
    assert "execution.metric_environments.total: nowhere.yaml" in done.stdout
