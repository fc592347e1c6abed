"""The cluster profiles as Snakemake reads them; no cluster is needed to plan."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.workflow.projects import ROOT, Project

PROFILES = ("slurm", "kubernetes")
ON_STORAGE = ("--default-storage-provider", "fs", "--default-storage-prefix")


def plan(folder: Path, profile: str, *flags: str, **config: object) -> tuple[int, str]:
    """Exit code and text of a dry run with a profile."""
    pytest.importorskip(f"snakemake_executor_plugin_{profile}")
    if profile == "kubernetes":
        if shutil.which("rsync") is None:
            pytest.skip("snakemake-storage-plugin-fs needs rsync")
        flags = (*ON_STORAGE, str(folder / "bucket"), *flags)
    path = ROOT / "profiles" / profile
    done = Project(folder).call("--profile", str(path), "--dry-run", *flags, config=config)
    return done.returncode, done.stdout


def resources(said: str, rule: str) -> dict[str, str]:
    """Those of a rule's first planned job."""
    match = re.search(rf"rule {rule}:\n(?:    .*\n)*?    resources: (.*)\n", said)
    assert match, said
    return dict(re.findall(r"(\w+)=([^,]*)", match[1]))


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_asks_for_what_each_rule_needs(tmp_path: Path, profile: str) -> None:
    code, said = plan(tmp_path, profile, execution={"training_gpus": 2})
    assert code == 0, said
    training, small = resources(said, "update_policy"), resources(said, "import_preferences")
    assert training["gpu"] == "2"
    assert "gpu" not in small
    assert (training["mem_mb"], small["mem_mb"]) == ("48000", "16000")
    if profile == "slurm":
        assert (training["runtime"], training["nodes"]) == ("1440", "1")
    else:
        assert (small["gpu_manufacturer"], small["scale"]) == ("nvidia", "0")
    planned = set(re.findall(r"^ *(?:local)?rule (\w+):", said, flags=re.MULTILINE))
    read = yaml.safe_load((ROOT / "profiles" / profile / "profile.yaml").read_text())
    assert set(read["set-resources"]) | set(read["groups"]) <= planned


@pytest.mark.parametrize(
    ("rank", "weights"),
    [(0, "unet"), pytest.param(4, "pytorch_lora_weights", marks=pytest.mark.slow)],
)
def test_in_a_bucket_a_policys_weights_are_outputs_and_inputs(
    tmp_path: Path, rank: int, weights: str
) -> None:
    code, said = plan(tmp_path, "kubernetes", lora={"rank": rank})
    assert code == 0, said
    assert len(re.findall(rf"    output: .*iter00/policy/{weights}", said)) == 1
    assert re.findall(rf"    input: .*iter00/policy/{weights}", said)
    _, on_a_disk = plan(tmp_path, "slurm", lora={"rank": rank})
    assert f"policy/{weights}" not in on_a_disk


def test_what_a_bucket_cannot_do_is_refused_at_the_start(tmp_path: Path) -> None:
    code, said = plan(tmp_path, "kubernetes", guards={"on_collapse": "stop"})
    assert code != 0
    assert "guards.on_collapse is stop" in said
    (tmp_path / "results").mkdir()
    code, said = plan(tmp_path, "kubernetes")
    assert code != 0
    assert "results/ is a folder here" in said


def test_a_second_profile_replaces_whole_keys(tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "profile.yaml").write_text("default-resources: {slurm_partition: big, runtime: 99}\n")
    code, said = plan(tmp_path, "slurm", "--profile", str(ours))
    assert code == 0, said
    small = resources(said, "import_preferences")
    assert (small["runtime"], small["slurm_partition"]) == ("99", "big")
    assert "cpus_per_task" not in small
    assert resources(said, "update_policy")["runtime"] == "1440"
