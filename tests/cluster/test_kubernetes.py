"""The profile for Kubernetes: what the plugin asks for, and its pods' commands in empty folders."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.builders import read_rows
from tests.cluster.conftest import Config, weights
from tests.cluster.pretend_kubernetes import Json, pretend_kubernetes
from tests.workflow.projects import ROOT, RUN, Project, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SCORES = f"results/{RUN}/iter01/scores/shard-0.parquet"
VOLUME = "sail-work:/workdir/work"


@pytest.fixture
def home(tmp_path: Path, config: Config) -> Path:
    """A folder with the workflow's sources, where Snakemake starts: it sends pods what lies below."""
    pytest.importorskip("snakemake_executor_plugin_kubernetes")
    pytest.importorskip("snakemake_storage_plugin_fs")
    if shutil.which("rsync") is None:
        pytest.skip("snakemake-storage-plugin-fs needs rsync")
    folder = tmp_path / "home"
    folder.mkdir()
    for name in ("workflow", "profiles", "envs"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "Snakefile", folder)
    Project(folder).command(config=config)  # writes the whole config
    for words in (["init", "--quiet"], ["add", "."]):  # it sends what git tracks
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


def call(home: Path, kubeconfig: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run the profile with a folder in the place of a bucket; pip takes one package a pod."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "snakemake", "--profile", "profiles/kubernetes"),
            *("--configfile", "config.yaml", "--container-image", "sail:1"),
            *("--default-storage-provider", "fs", "--seconds-between-status-checks", "2"),
            *("--default-storage-prefix", str(home.parent / "bucket")),
            *("--kubernetes-persistent-volumes", VOLUME, "--cores", "2", "--jobs", "2"),
            *flags,
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=home,
        env={**environment(), "KUBECONFIG": str(kubeconfig), "PIP_NO_DEPS": "1"},
    )  # fmt: skip


def test_pods_get_what_they_need_from_the_bucket_and_end_as_a_local_run(
    home: Path, finished: Project, tmp_path: Path
) -> None:
    with pretend_kubernetes(tmp_path / "pods", kill_first="train_seed") as (server, kubeconfig):
        done = call(home, kubeconfig, "--", SCORES)
    assert done.returncode == 0, done.stdout
    bucket = tmp_path / "bucket"
    policy = f"results/{RUN}/iter00/policy"
    assert weights(bucket / policy) == weights(finished.folder / policy)
    assert read_rows(bucket / SCORES) == read_rows(finished.folder / SCORES)
    assert not list(tmp_path.rglob("pwned"))

    pods = {rule: [job for job in server.jobs if rules_of(job) == rule] for rule in EXPECTED}
    assert {rule: len(jobs) for rule, jobs in pods.items()} == EXPECTED
    assert sum(EXPECTED.values()) == len(server.jobs)
    assert [memory(job) for job in pods["train_seed"]] == ["48000M", "96000M"]
    for job in server.jobs:
        assert_fair(job, gpus=0 if rules_of(job) == "import_preferences" else 1)


EXPECTED = {
    "make_preferences": 1,
    "import_preferences": 1,
    "encode_preferences": 2,
    "train_seed": 2,  # the first is killed
    "sample_candidates score_candidates": 1,
}
"""Pods of each rule or group; the rest runs beside Snakemake."""


def rules_of(job: Json) -> str:
    """The rules that a pod's command names, in their alphabet's order."""
    command = container(job)["args"][-1]
    words = command.partition("--allowed-rules ")[2].partition(" --")[0]
    return " ".join(sorted(words.split()))


def container(job: Json) -> dict[str, Any]:
    """A pod's only container."""
    [only] = job["spec"]["template"]["spec"]["containers"]
    return only


def memory(job: Json) -> str:
    """What a pod asks for."""
    return container(job)["resources"]["requests"]["memory"]


def assert_fair(job: Json, *, gpus: int) -> None:
    """A pod that a cluster would take: its GPUs as a limit, its volumes mounted, one try.

    A pod without a GPU asks for none and stays off the nodes that have some.
    """
    spec = job["spec"]["template"]["spec"]
    resources = container(job)["resources"]
    asked = str(gpus) if gpus else None
    for kind in ("requests", "limits"):
        assert resources[kind].get("nvidia.com/gpu") == asked
    assert resources["limits"]["memory"] == resources["requests"]["memory"]
    assert job["spec"]["backoffLimit"] == 0
    assert spec["restartPolicy"] == "Never"
    tolerated = [taint["key"] for taint in spec.get("tolerations") or []]
    assert tolerated == (["nvidia.com/gpu"] if gpus else [])
    assert {mount["mountPath"] for mount in container(job)["volumeMounts"]} == {
        "/workdir",
        "/workdir/work",
    }
    assert "sail-work" in [volume["name"] for volume in spec["volumes"]]
    assert container(job)["image"] == "sail:1"
